"""What a tokenizer training leaves behind: TensorBoard, W&B, pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tokenizer_training_case import read_rows, small_config
from PIL import Image

from cosmos_posttrain import runlog
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.tokenizer_training.run_log import reconstruction_picture
from cosmos_posttrain.tokenizer_training.trainer import train


def test_picture_shows_the_input_above_the_reconstruction() -> None:
    video = torch.zeros(3, 17, 8, 10)
    video[0] = torch.linspace(-1, 1, 17).view(17, 1, 1)
    picture = reconstruction_picture(video, torch.full_like(video, 1.7))
    assert picture.shape == (16, 80, 3) and picture.dtype == np.uint8
    assert (picture[8:] == 255).all()
    reds = picture[0, ::10, 0]
    assert reds[0] == 0 and reds[-1] == 255 and (np.diff(reds.astype(int)) > 0).all()
    assert (picture[:8, :, 1] == 128).all()


def test_every_number_and_picture_is_in_tensorboard_once(videos: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(small_config(videos, tmp_path))
    rows = read_rows(tmp_path)
    board = EventAccumulator(str(tmp_path / "tb_logs")).Reload()
    for name in rows[-1].keys() - {"step"}:
        logged = {event.step: event.value for event in board.Scalars(name)}
        expected = {row["step"]: row[name] for row in rows if name in row}
        assert logged == pytest.approx(expected, rel=1e-6), name
    wanted = {"psnr", "ssim", "codes_used", "entropy_bits"}
    assert {f"validation_{name}" for name in wanted} <= rows[-1].keys()
    assert [event.step for event in board.Images("reconstructions")] == [2, 5]
    files = sorted((tmp_path / "reconstructions").iterdir())
    assert [file.name for file in files] == ["step=3.png", "step=6.png"]
    with Image.open(files[0]) as image:
        assert image.size == (5 * 48, 2 * 32)


def test_wandb_gets_the_same_when_the_environment_asks(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    finished: list[bool] = []
    run = SimpleNamespace(
        log=lambda values, step: logged.append((step, values)),
        finish=lambda: finished.append(True),
    )
    wandb = ModuleType("wandb")
    wandb.init = lambda **_: run  # type: ignore[attr-defined]
    wandb.Image = lambda pixels: pixels.shape  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(runlog, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(small_config(videos, tmp_path, max_steps=2))
    rows = read_rows(tmp_path)
    assert (1, {"reconstructions": (64, 240, 3)}) in logged
    numbers = [(step, values) for step, values in logged if "loss" in values]
    assert numbers == [(r["step"], {k: v for k, v in r.items() if k != "step"}) for r in rows]
    assert finished == [True]


def test_wandb_that_is_asked_for_but_absent_stops_before_anything_is_written(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runlog, "find_spec", lambda name: None)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    with pytest.raises(ConfigError, match="not installed"):
        train(small_config(videos, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    train(small_config(videos, tmp_path / "run", max_steps=1))
    assert len(read_rows(tmp_path / "run")) == 1


def test_a_log_says_how_it_stands_at_validations_and_when_asked(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(small_config(videos, tmp_path / "quiet"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["3/6", "6/6"]
    assert all(" validation psnr " in line for line in lines)
    train(small_config(videos, tmp_path / "often", log_every=2))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["2/6", "3/6", "4/6", "6/6"]
