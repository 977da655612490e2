"""PSNR, SSIM and codebook figures against their references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from cosmos_posttrain.evaluation import quality
from cosmos_posttrain.tokenizer_training import losses
from cosmos_posttrain.video import to_float


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """A clip with flat and busy parts, and a copy with noise that grows from frame to frame."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.randint(0, 256, (3, 5, 24, 40), generator=generator)
    clip[:, :, :12] = 90
    noise = torch.randint(-8, 9, clip.shape, generator=generator)
    noise = noise * torch.arange(5)[:, None, None]
    return clip.to(torch.uint8), (clip + noise).clamp(0, 255).to(torch.uint8)


def test_psnr_is_that_of_the_whole_clip(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = peak_signal_noise_ratio(pair[0].numpy(), pair[1].numpy(), data_range=255)
    # The error differs by frame, so the mean of the frames' PSNR would be another number.
    assert quality.psnr(*pair, num_threads=2) == pytest.approx(expected, abs=1e-9)


def test_one_grey_level_off_everywhere_is_48_db() -> None:
    clip = torch.full((3, 2, 8, 8), 100, dtype=torch.uint8)
    assert quality.psnr(clip, clip + 1) == pytest.approx(20 * np.log10(255))


def test_an_exact_copy_scores_the_highest_values(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert quality.psnr(pair[0], pair[0]) == quality.MAX_PSNR
    assert quality.ssim(pair[0], pair[0]) == pytest.approx(1.0)


def test_training_measures_the_same(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
    clip, rebuilt = (to_float(v)[None] for v in pair)
    # Training computes in float32.
    assert quality.psnr(*pair) == pytest.approx(losses.psnr(rebuilt, clip).item(), abs=1e-4)
    assert quality.ssim(*pair) == pytest.approx(losses.ssim(rebuilt, clip).item(), abs=1e-4)


def test_codebook_use_of_known_counts() -> None:
    indices = torch.tensor([[[0, 0, 3, 3], [5, 5, 5, 5]]], dtype=torch.int32)
    counts = quality.count_codes(indices, vocab_size=8)
    assert counts.tolist() == [2, 0, 0, 2, 0, 4, 0, 0]
    use = quality.codebook_use(counts)
    assert use == {
        "num_tokens": 8,
        "codes_used": 3,
        "vocabulary_share": 3 / 8,
        "entropy_bits": pytest.approx(1.5),  # 1/4, 1/4, 1/2
    }


def test_one_code_alone_carries_nothing() -> None:
    use = quality.codebook_use(np.array([0, 7, 0], np.int64))
    assert str(use["entropy_bits"]) == "0.0"  # not -0.0, which JSON would show
