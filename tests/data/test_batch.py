"""Batches: layout of sequences, and the same global batch for every division of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.prepared import make_videos, prepare_small

from cosmos_posttrain.data.batch import (
    BatchSizes,
    SequenceLayout,
    training_batches,
    validation_batches,
)
from cosmos_posttrain.data.dataset import TokenDataset


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("batch")
    (folder / "videos").mkdir()
    prepare_small(make_videos(folder / "videos"), folder / "tokens")
    return folder / "tokens"


def test_a_base_sequence_predicts_every_token_but_the_first() -> None:
    clips = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    batch = SequenceLayout(4).batch(clips, torch.tensor([1.0, 0.0]))
    assert torch.equal(batch.tokens, clips)
    assert torch.equal(batch.labels[:, :3], clips[:, 1:])
    assert batch.loss_mask.tolist() == [[1, 1, 1, 0], [0, 0, 0, 0]]
    assert batch.context is None


def test_a_sequence_with_prefix_and_padding_predicts_every_clip_token() -> None:
    clips = torch.tensor([[3, 1, 4]])
    context = torch.ones(1, 2, 5)
    batch = SequenceLayout(6, (100,), 102).batch(clips, torch.ones(1), context)
    assert batch.tokens.tolist() == [[100, 3, 1, 4, 102, 102]]
    assert batch.loss_mask.tolist() == [[1, 1, 1, 0, 0, 0]]
    assert batch.labels[batch.loss_mask > 0].tolist() == [3, 1, 4]
    assert batch.context is context


def test_a_part_of_the_sequence_keeps_the_whole_context() -> None:
    batch = SequenceLayout(4).batch(torch.arange(8).view(2, 4), torch.ones(2), torch.ones(2, 3, 1))
    part = batch.at(torch.tensor([0, 3]))
    assert part.tokens.tolist() == [[0, 3], [4, 7]]
    assert part.loss_mask.tolist() == [[1, 0], [1, 0]]
    assert part.context is not None and part.context.shape == (2, 3, 1)


def test_global_batches_do_not_depend_on_their_division(tokens: Path) -> None:
    clips = TokenDataset(tokens, "train", "3,1,1")
    layout = SequenceLayout(clips.seq_length)
    streams = []
    for micro, num_ranks in ((1, 1), (2, 1), (4, 1), (1, 2), (2, 2)):
        parts = []
        for rank in range(num_ranks):
            sizes = BatchSizes(4, micro, rank, num_ranks)
            batches = training_batches(clips, layout, sizes, consumed_samples=8, seed=1)
            steps = [next(batches) for _ in range(3)]
            parts.append([torch.stack([b.tokens for b in step]) for step in steps])
        # Micro-batches of all ranks alternate in the global stream.
        stream = [torch.stack(step, dim=1).flatten(0, 2) for step in zip(*parts, strict=True)]
        streams.append(torch.cat(stream))
    assert all(torch.equal(streams[0], stream) for stream in streams[1:])


def test_validation_counts_every_clip_once(tokens: Path) -> None:
    clips = TokenDataset(tokens, "validation", "2,3,0")
    layout = SequenceLayout(clips.seq_length)
    batches = [b for row in validation_batches(clips, layout, BatchSizes(4, 4), 9) for b in row]
    rows = torch.cat([batch.loss_mask[:, 0] for batch in batches]) > 0
    assert int(rows.sum()) == len(clips)
    kept = torch.cat([batch.tokens for batch in batches])[rows]
    assert torch.equal(kept, torch.stack([clips[i] for i in range(len(clips))]))
    limited = list(validation_batches(clips, layout, BatchSizes(2, 2), 1))
    assert len(limited) == 1
