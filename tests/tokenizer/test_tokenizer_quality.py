"""The shipped tiny tokenizers on real clips that they were not trained on."""

from __future__ import annotations

import pytest
import torch
from reference import SAMPLES_DIR, needs_samples

from cosmos_posttrain.tokenizer import SHIPPED, load_tokenizer
from cosmos_posttrain.training.tokenizer.losses import psnr
from cosmos_posttrain.video import read_clips, to_float

# Lowest PSNR in dB and lowest number of codes used over the clips. A coder that paints each block
# in its mean colour, from a palette of 1,000 colours (k-means on the training clips), reaches 23.5,
# 23.4 and 21.5 dB here: a network has to be better than that to be worth having.
THRESHOLDS = {
    "tiny-dv4x8x8": (24.5, 450),
    "tiny-dv8x8x8": (23.7, 400),
    "tiny-dv8x16x16": (22.2, 250),
}


@needs_samples
@pytest.mark.parametrize("name", SHIPPED.values())
def test_shipped_tokenizer_beats_the_block_palette(name: str) -> None:
    tokenizer = load_tokenizer(name, device="cpu")
    scores: list[torch.Tensor] = []
    used: set[int] = set()
    for path in sorted(SAMPLES_DIR.glob("[0-9].mp4")):
        video = to_float(read_clips(path, [0], 17, 96, 160)[0].frames)[None]
        indices = tokenizer.encode(video)
        scores.append(psnr(tokenizer.decode(indices), video))
        used.update(indices.unique().tolist())
    assert len(scores) == 10
    lowest_psnr, lowest_used = THRESHOLDS[name]
    assert torch.cat(scores).mean() >= lowest_psnr
    assert len(used) >= lowest_used
