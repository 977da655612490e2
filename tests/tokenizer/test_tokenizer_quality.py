"""The shipped tiny tokenizers on real clips that they were not trained on."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from helpers.reference import SAMPLES_DIR, needs_samples

from cosmos_posttrain.evaluation.palette import fit_palette
from cosmos_posttrain.tokenizer import SHIPPED, load_tokenizer
from cosmos_posttrain.tokenizer_training.config import TokenizerDataConfig
from cosmos_posttrain.tokenizer_training.data import ClipSource
from cosmos_posttrain.tokenizer_training.losses import psnr
from cosmos_posttrain.video import read_clips, to_float

NUM_FRAMES, HEIGHT, WIDTH = 17, 96, 160
MARGIN_DB = 0.6
MIN_CODE_SHARE = 0.5


@pytest.fixture(scope="module")
def training_clips() -> torch.Tensor:
    """Clips as the tiny tokenizers were trained on: (N, 3, T, H, W) in [-1, 1].

    Without the still photographs, with which the palette comes out 0.05 to 0.1 dB worse.
    """
    source = ClipSource(TokenizerDataConfig(photographs=False))
    generator = torch.Generator().manual_seed(0)
    return source.batch(128, NUM_FRAMES, (HEIGHT, WIDTH), generator)


@pytest.fixture(scope="module")
def sample_clips() -> torch.Tensor:
    """The first frames of the ten sample clips, resized: (10, 3, T, H, W) in [-1, 1]."""
    paths = sorted(SAMPLES_DIR.glob("[0-9].mp4"))
    assert len(paths) == 10
    read = partial(read_clips, starts=[0], num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH)
    return to_float(torch.stack([read(path)[0].frames for path in paths]))


def measure(coder: Any, clips: torch.Tensor) -> tuple[float, int]:
    """Mean PSNR in dB, and codes used over all clips."""
    indices = torch.cat([coder.encode(clip) for clip in clips.split(1)])
    decoded = torch.cat([coder.decode(grid) for grid in indices.split(1)])
    return psnr(decoded, clips).mean().item(), indices.unique().numel()


@needs_samples
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "tiny-dv4x8x8"))
        for name in SHIPPED.values()
    ],
)
def test_shipped_tokenizer_beats_the_palette_of_its_rate_and_vocabulary(
    name: str, training_clips: torch.Tensor, sample_clips: torch.Tensor
) -> None:
    tokenizer = load_tokenizer(name, device="cpu")
    palette = fit_palette(training_clips, tokenizer.compression, tokenizer.vocab_size)
    reached, codes_used = measure(tokenizer, sample_clips)
    trivial, _ = measure(palette, sample_clips)
    print(f"{name}: {reached:.2f} dB, palette {trivial:.2f} dB, {codes_used} codes used")
    assert reached >= trivial + MARGIN_DB
    # A vocabulary of about 1,000; one of many thousand could not occur in so few tokens.
    if tokenizer.vocab_size <= 1200:
        assert codes_used > MIN_CODE_SHARE * tokenizer.vocab_size
