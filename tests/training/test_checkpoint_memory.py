"""Saving and loading take little memory beyond what the run holds anyway."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import psutil
import pytest
import torch
from helpers import training_state
from helpers.distributed_run import run_distributed
from helpers.memory import peak_memory

from cosmos_posttrain.checkpoint import dist
from cosmos_posttrain.models.presets import preset

# 187 million parameters, the largest tensor of which (the embedding) has 33 million.
MODEL = dataclasses.replace(
    preset("tiny", vocab_size=32000),
    num_layers=8,
    hidden_size=1024,
    num_attention_heads=8,
    kv_channels=128,
    ffn_hidden_size=4096,
)
# Of a rank's own part of the state. A piece at a time is copied, here at most 0.12 of it; what a
# fresh optimizer allocates to load into (two thirds or more of its part) counts when loading.
LIMIT_SAVING, LIMIT_LOADING = 0.3, 1.3


def measure(folder: Path, dtype: torch.dtype) -> tuple[float, float, float]:
    """Peaks over the rank's own part: saving, loading into a fresh run, into a running one."""
    state = training_state.build(MODEL, dtype)
    state.step(1)
    own = dist.num_bytes(state.model, state.optimizer) / 2
    with peak_memory() as saving:
        dist.save(folder, state.model, state.optimizer)
    assert not psutil.Process().children()
    with peak_memory() as again:
        dist.load(folder, state.model, state.optimizer)
    del state
    state = training_state.build(MODEL, dtype)
    with peak_memory() as fresh:
        dist.load(folder, state.model, state.optimizer)
    return saving.num_bytes / own, fresh.num_bytes / own, again.num_bytes / own


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_each_rank_copies_a_piece_at_a_time(tmp_path: Path, dtype: torch.dtype) -> None:
    results = run_distributed(measure, 2, tmp_path, dtype, timeout_seconds=600)
    for saving, fresh, again in results:
        assert saving <= LIMIT_SAVING
        assert fresh <= LIMIT_LOADING and again <= LIMIT_SAVING
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.distcp"))]
    assert len(sizes) == 2 and max(sizes) <= 1.01 * min(sizes)
