"""The guardrail within a run: blocked prompts are failures of their items, faces never appear.

Its package brings models that few install; a module of the same names stands in for it here, as in
``test_guardrail.py``, which runs the package itself where it is.
"""

from __future__ import annotations

import gc
import json
import sys
import types
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import infer_case
from helpers.infer_case import FRAMES, HEIGHT, WIDTH, random_config

from cosmos_posttrain.errors import PartialFailureError, UserError
from cosmos_posttrain.inference.batch import run
from cosmos_posttrain.inference.guardrail import Guardrail
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.video import read_clips

NAME = "cosmos_guardrail.cosmos_guardrail"
alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


class Blocklist(torch.nn.Module):
    """Blocks one word."""

    def __init__(self) -> None:
        super().__init__()
        alive.add(self)

    def is_safe(self, text: str) -> tuple[bool, str]:
        return "forbidden" not in text, ""


class RetinaFaceFilter(torch.nn.Module):
    """Takes everything for a face, and makes it grey."""

    def __init__(self) -> None:
        super().__init__()
        alive.add(self)

    def postprocess(self, frames: np.ndarray) -> np.ndarray:
        return np.full_like(frames, 128)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "guardrail"
    for name in ("custom", "exact_match", "whitelist"):
        (folder / "blocklist" / name).mkdir(parents=True)
        (folder / "blocklist" / name / "words.txt").write_text("word\n")
    (folder / "face_blur_filter").mkdir()
    (folder / "face_blur_filter" / "Resnet50_Final.pth").write_bytes(b"weights")
    module: Any = types.ModuleType(NAME)
    module.Blocklist, module.RetinaFaceFilter = Blocklist, RetinaFaceFilter
    module.snapshot_download = None
    monkeypatch.setitem(sys.modules, "cosmos_guardrail", types.ModuleType("cosmos_guardrail"))
    monkeypatch.setitem(sys.modules, NAME, module)
    return folder


def guarded(weights: Path, folder: Path, **changes: Any) -> Any:
    values = {
        "ar_model_dir": "random:tiny-video2world",
        "text_encoder_path": "tiny",
        "guardrail_dir": str(weights),
        "disable_guardrail": False,
    }
    return random_config(folder, folder / "out", **(values | changes))


@pytest.mark.parametrize("offload", [False, True])
def test_blocked_prompts_fail_and_faces_are_blurred(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, offload: bool
) -> None:
    video = infer_case.write_input(tmp_path / "bar.mp4")
    jsonl = tmp_path / "batch.jsonl"
    rows = [{"prompt": text, "visual_input": "bar.mp4"} for text in ("a ball", "forbidden", "b")]
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows))
    during: list[int] = []
    generate = Session.generate_many

    def counting(self: Session, *arguments: Any) -> Any:
        gc.collect()
        during.append(len(alive))
        return generate(self, *arguments)

    monkeypatch.setattr(Session, "generate_many", counting)
    config = guarded(
        weights,
        tmp_path,
        input_image_or_video_path=None,
        batch_input_path=str(jsonl),
        batch_size=1,
        side_by_side=True,
        offload_guardrail_models=offload,
    )
    with pytest.raises(PartialFailureError, match=r"1 of 3 .*line 2: the guardrail blocks"):
        run(config)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("bar*.mp4")) == [
        *("bar.mp4", "bar.side_by_side.mp4"),
        *("bar_3.mp4", "bar_3.side_by_side.mp4"),
    ]
    for name, width in (("bar.mp4", WIDTH), ("bar_3.side_by_side.mp4", 2 * WIDTH)):
        frames = read_clips(out / name, [0], FRAMES, HEIGHT, width)[0].frames
        assert (frames.int() - 128).abs().max() <= 2
    # The word lists and, from the second clip on, the face detector; nothing where they are freed.
    assert during == ([0, 0] if offload else [1, 2])
    del video


def test_one_blocked_prompt_is_one_sentence(tmp_path: Path, weights: Path) -> None:
    video = infer_case.write_input(tmp_path / "bar.mp4")
    config = guarded(
        weights, tmp_path, input_image_or_video_path=str(video), prompt="a forbidden thing"
    )
    with pytest.raises(UserError, match="the guardrail blocks the prompt 'a forbidden thing'"):
        run(config)
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_what_is_not_checked_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = infer_case.write_input(tmp_path / "bar.mp4")
    run(random_config(video, tmp_path / "out", disable_guardrail=False))
    assert "nothing was checked" in capsys.readouterr().err
    run(random_config(video, tmp_path / "other"))
    assert "checked" not in capsys.readouterr().err
    assert not Guardrail(None).is_active
