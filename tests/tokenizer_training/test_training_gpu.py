"""Tokenizer training on a GPU, in bfloat16, stopped and continued."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.tokenizer_training_case import read_rows, small_config

from cosmos_posttrain.tokenizer import load_tokenizer
from cosmos_posttrain.tokenizer_training import trainer

pytestmark = pytest.mark.gpu


class Stopped(BaseException):
    pass


def test_bfloat16_trains_goes_on_and_gives_a_tokenizer(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(videos, tmp_path / "out", device="auto", precision="bfloat16")
    step = trainer._Trainer.step

    def step_until_stopped(self: trainer._Trainer) -> dict[str, float]:
        if self.completed_steps == 5:
            raise Stopped
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(trainer._Trainer, "step", step_until_stopped)
        trainer.train(config)
    torch.cuda.reset_peak_memory_stats()
    trainer.train(config)  # goes on from the state saved after three steps
    assert torch.cuda.max_memory_allocated() > 1e6
    rows = read_rows(tmp_path / "out")
    assert [row["step"] for row in rows] == list(range(6))
    assert all(math.isfinite(value) for row in rows for value in row.values() if value is not None)
    tokenizer = load_tokenizer(tmp_path / "out", device="cuda")
    video = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    decoded = tokenizer.decode(tokenizer.encode(video))
    assert decoded.shape == video.shape and bool(torch.isfinite(decoded).all())
