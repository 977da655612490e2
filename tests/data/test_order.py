"""The stream of samples: shares of data sets, draws of clips, and the same from any place on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cosmos_posttrain.data.order import Chosen, Mixed, Order, Shuffled, make_order
from cosmos_posttrain.errors import DatasetError

# Three data sets of 40, 7 and 1 clips; videos of 4 clips each, the last of one.
SETS = np.repeat([0, 1, 2], [40, 7, 1])
VIDEOS = np.arange(48) // 4


def stream(order: Order, first: int, count: int) -> list[int]:
    return [order.clip_at(position) for position in range(first, first + count)]


def orders() -> dict[str, Order]:
    """Made anew, as a resumed run makes them."""
    return {
        "all": make_order(SETS, None, None, None, seed=5),
        "chosen": make_order(SETS, VIDEOS, None, 2, seed=5),
        "mixed": make_order(SETS, None, (0.6, 0.3, 0.1), None, seed=5),
        "both": make_order(SETS, VIDEOS, (6, 3, 1), 2, seed=5),
    }


@pytest.mark.parametrize("kind", orders())
def test_any_position_is_the_same_however_it_is_reached(kind: str) -> None:
    whole = stream(orders()[kind], 0, 300)
    for first in (1, 23, 24, 47, 48, 49, 130, 251):
        assert stream(orders()[kind], first, 40) == whole[first : first + 40]
    again = orders()[kind]
    backwards = [again.clip_at(position) for position in reversed(range(300))]
    assert backwards[::-1] == whole
    assert set(whole) <= set(range(48))


def test_without_settings_the_order_is_what_it_always_was() -> None:
    """Runs that were begun before there was a choice go on with the same clips."""
    ours = stream(make_order(SETS, None, None, None, seed=3), 0, 96)
    rows = [np.random.default_rng([3, epoch]).permutation(48) for epoch in (0, 1)]
    assert ours == np.concatenate(rows).tolist()


def test_each_video_gives_so_many_clips_an_epoch_and_others_the_next_time() -> None:
    order = Chosen(VIDEOS, 2, seed=1)
    assert order.num_samples == 24
    epochs = [stream(order, 24 * epoch, 24) for epoch in range(40)]
    for clips in epochs:
        assert len(set(clips)) == 24
        assert Counter(VIDEOS[clips].tolist()) == dict.fromkeys(range(12), 2)
    assert len({tuple(sorted(clips)) for clips in epochs}) == 40
    # Each of the 48 clips is drawn with probability 1/2: 20 times of 40, standard deviation 3.2.
    counts = Counter(clip for clips in epochs for clip in clips)
    assert len(counts) == 48 and min(counts.values()) >= 6 and max(counts.values()) <= 34


def test_videos_with_few_clips_give_all_of_them() -> None:
    videos = np.array([7, 7, 7, 2, 2, 9])
    order = Chosen(videos, 2, seed=1)
    assert order.num_samples == 5
    clips = stream(order, 0, 5)
    assert Counter(videos[clips].tolist()) == {7: 2, 2: 2, 9: 1}
    assert Chosen(videos, 100, seed=1).num_samples == 6


def test_each_data_set_has_its_share_of_every_epoch() -> None:
    order = make_order(SETS, None, (0.6, 0.3, 0.1), None, seed=5)
    assert order.num_samples == 48
    for epoch in range(4):
        clips = stream(order, 48 * epoch, 48)
        # 28.8, 14.4 and 4.8 by largest remainder
        assert Counter(SETS[clips].tolist()) == {0: 29, 1: 14, 2: 5}
    # Each set goes through all its clips before one comes again.
    first = [clip for clip in stream(order, 0, 480) if SETS[clip] == 0]
    for start in range(0, len(first) - 40, 40):
        assert sorted(first[start : start + 40]) == list(range(40))
    # And the sets take turns within an epoch, not one after the other.
    sets = SETS[stream(order, 0, 48)]
    assert (np.diff(sets) != 0).sum() > 10


def test_shares_count_in_their_ratio_and_the_smallest_set_is_never_left_out() -> None:
    parts = [np.flatnonzero(number == SETS) for number in range(3)]
    pools = [Shuffled(len(part), 0) for part in parts]
    order = Mixed(pools, parts, (7000, 1, 1), seed=0)
    assert Counter(SETS[stream(order, 0, 48)].tolist()) == {0: 46, 1: 1, 2: 1}


def test_clips_are_drawn_within_each_data_set() -> None:
    order = make_order(SETS, VIDEOS, (0.5, 0.4, 0.1), 1, seed=2)
    # Ten videos, two videos (of 4 and 3 clips), and one that the second set has too.
    assert order.num_samples == 10 + 2 + 1
    clips = [clip for clip in stream(order, 0, 13 * 20) if SETS[clip] == 0]
    assert sorted(VIDEOS[clips[:10]].tolist()) == list(range(10))


def test_a_set_without_training_clips_is_named() -> None:
    with pytest.raises(DatasetError, match="data set 2 of 2 has no clip in the training split"):
        make_order(np.zeros(4, np.int64), None, (1, 1), None, seed=0)
