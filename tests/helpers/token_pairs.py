"""Small co-occurrences that are made up, and rows of the old tokens in them."""

from __future__ import annotations

import numpy as np
import torch

from cosmos_posttrain.transfer.cooccurrence import Cooccurrence
from helpers.contracts import make_tokenizer

OLD_SIZE, NEW_SIZE, HIDDEN = 30, 20, 16


def make_pairs(volumes: np.ndarray, occurrences: np.ndarray) -> Cooccurrence:
    """From a dense C[v, o]."""
    new, old = np.nonzero(volumes)
    return Cooccurrence(
        make_tokenizer("old", volumes.shape[1]),
        make_tokenizer("new", volumes.shape[0]),
        new.astype(np.int32),
        old.astype(np.int32),
        volumes[new, old].astype(np.float32),
        occurrences,
        {"num_clips": 3, "num_new_tokens": int((occurrences > 0).sum())},
    )


def dense_overlaps() -> tuple[np.ndarray, np.ndarray]:
    """C with many zeros, and sightings; token 7 was never seen, token 8 once."""
    generator = np.random.default_rng(0)
    volumes = generator.exponential(1.0, (NEW_SIZE, OLD_SIZE))
    volumes *= generator.random((NEW_SIZE, OLD_SIZE)) < 0.2
    volumes[7] = 0
    volumes[8] = 0
    volumes[8, 3] = 1
    occurrences = generator.integers(1, 60, NEW_SIZE) * (volumes.sum(1) > 0)
    occurrences[8] = 1
    return volumes, occurrences


def make_old_rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(OLD_SIZE, HIDDEN, generator=generator) + 1.0
