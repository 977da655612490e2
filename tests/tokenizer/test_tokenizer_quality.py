"""The shipped tiny tokenizers on real clips that they were not trained on."""

from __future__ import annotations

import pytest
import torch
from reference import SAMPLES_DIR, needs_samples

from cosmos_posttrain.tokenizer import SHIPPED, load_tokenizer
from cosmos_posttrain.training.tokenizer.losses import psnr
from cosmos_posttrain.video import read_clips, to_float

# PSNR in dB of a coder that paints each block in its mean colour, from a palette of 1,000 colours
# (k-means): 23.9, 23.7 and 21.8. A network has to be better than that to be worth having.
THRESHOLDS = {"tiny-dv4x8x8": 24.5, "tiny-dv8x8x8": 24.3, "tiny-dv8x16x16": 22.4}


@needs_samples
@pytest.mark.parametrize("name", SHIPPED.values())
def test_shipped_tokenizer_beats_the_block_palette(name: str) -> None:
    tokenizer = load_tokenizer(name, device="cpu")
    scores, used = [], set()
    for path in sorted(SAMPLES_DIR.glob("[0-9].mp4")):
        video = to_float(read_clips(path, [0], 17, 96, 160)[0].frames)[None]
        indices = tokenizer.encode(video)
        scores.append(psnr(tokenizer.decode(indices), video))
        used.update(indices.unique().tolist())
    assert len(scores) == 10
    assert torch.cat(scores).mean() >= THRESHOLDS[name]
    assert len(used) > tokenizer.vocab_size / 2
