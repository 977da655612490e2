"""The order of clips: the same global batches for any number of ranks, and after resuming."""

from __future__ import annotations

from itertools import islice

import pytest

from cosmos_posttrain.data import ClipSampler
from cosmos_posttrain.errors import ConfigError, DatasetError


def global_batches(num_batches, global_batch_size, micro, ranks, consumed=0, num_samples=11):
    steps = global_batch_size // (micro * ranks)
    streams = [
        iter(ClipSampler(num_samples, micro, rank, ranks, consumed, seed=3))
        for rank in range(ranks)
    ]
    return [
        sorted(clip for stream in streams for part in islice(stream, steps) for clip in part)
        for _ in range(num_batches)
    ]


def test_global_batches_do_not_depend_on_ranks_or_micro_batches():
    one = global_batches(9, 8, 1, 1)
    for micro, ranks in [(2, 1), (8, 1), (1, 2), (2, 2), (4, 2), (1, 4), (2, 4), (1, 8)]:
        assert global_batches(9, 8, micro, ranks) == one


def test_resuming_gives_the_batches_that_were_left():
    whole = global_batches(12, 4, 2, 1)
    for done in (1, 5, 11):
        rest = global_batches(12 - done, 4, 1, 2, consumed=4 * done)
        assert rest == whole[done:]


def test_each_epoch_has_every_clip_once_in_a_new_order():
    clips = [clip for batch in islice(ClipSampler(7, 1), 21) for clip in batch]
    epochs = [clips[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    other = [clip for batch in islice(ClipSampler(7, 1, seed=5), 7) for clip in batch]
    assert other != epochs[0]


def test_batches_may_be_larger_than_the_data():
    assert next(iter(ClipSampler(1, 3))) == [0, 0, 0]


def test_senseless_settings_are_refused():
    with pytest.raises(DatasetError, match="holds no clip"):
        ClipSampler(0, 1)
    for arguments in [(5, 0), (5, 1, 2, 2), (5, 1, -1, 2), (5, 1, 0, 1, -1)]:
        with pytest.raises(ConfigError):
            ClipSampler(*arguments)
