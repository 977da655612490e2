"""Which clip stands at each place of the endless stream of samples that a run is trained on.

Flows in: the clips of a split: how many, of which video, of which data set. Flows out: a clip for
each position, a pure function of the seed and the position. An epoch is so many positions:

    Shuffled   every clip once
    Chosen     of each video at most so many of its clips, drawn anew
    Mixed      as many as all sets' own epochs have together, each set by its share

Only what the current epoch needs is held: one number for each of its positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cosmos_posttrain.data.splits import share_out
from cosmos_posttrain.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MIXED, _SET = 2, 3  # so that no draw is that of another kind


class Order(Protocol):
    """Which clip stands where."""

    num_samples: int
    """Positions of an epoch."""

    def clip_at(self, position: int) -> int:
        """The clip at a position of the endless stream."""
        ...


class Shuffled:
    """Every clip once in each epoch.

    Args:
        num_clips: their number.
        seed: of the permutations; a list of numbers where several orders share a seed.
    """

    def __init__(self, num_clips: int, seed: int | Sequence[int]) -> None:
        self.num_samples = num_clips
        self._seed = [seed] if isinstance(seed, int) else list(seed)
        # One value, so that two threads may ask.
        self._held: tuple[int, NDArray[np.int64]] = -1, np.empty(0, np.int64)

    def clip_at(self, position: int) -> int:
        """The clip at a position of the endless stream."""
        epoch, offset = divmod(position, self.num_samples)
        held = self._held
        if epoch != held[0]:
            held = self._held = epoch, self._draw(epoch)
        return int(held[1][offset])

    def _generator(self, epoch: int) -> np.random.Generator:
        first, *rest = self._seed
        return np.random.default_rng([first, epoch, *rest])

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        return self._generator(epoch).permutation(self.num_samples)


class Chosen(Shuffled):
    """At most some clips of each video in each epoch, drawn anew.

    Args:
        videos: (num_clips,) a number for each clip's video.
        clips_per_video: how many are drawn; of a video with fewer, all.
        seed: of the draws.
    """

    def __init__(
        self, videos: NDArray[np.int64], clips_per_video: int, seed: int | Sequence[int]
    ) -> None:
        self._videos, self._limit = videos, clips_per_video
        counts = np.unique(videos, return_counts=True)[1]
        super().__init__(int(np.minimum(counts, clips_per_video).sum()), seed)

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        generator = self._generator(epoch)
        clips = np.lexsort((generator.random(len(self._videos)), self._videos))
        sorted_videos = self._videos[clips]
        is_first = np.r_[True, sorted_videos[1:] != sorted_videos[:-1]]
        places = np.arange(len(clips))
        place_in_video = places - np.maximum.accumulate(np.where(is_first, places, 0))
        return generator.permutation(clips[place_in_video < self._limit])


class Mixed:
    """Several data sets, each with its share of every epoch; each goes through epochs of its own.

    Args:
        orders: of each set, over its own clips.
        clips: of each set, the numbers that its clips have in the whole.
        shares: of each set, above 0; only their ratio counts.
        seed: of the order in which the sets take turns.
    """

    def __init__(
        self,
        orders: Sequence[Order],
        clips: Sequence[NDArray[np.int64]],
        shares: Sequence[float],
        seed: int,
    ) -> None:
        self._orders, self._clips, self._seed = list(orders), list(clips), seed
        self.num_samples = sum(order.num_samples for order in orders)
        total = sum(shares)
        self._counts = share_out(self.num_samples, [share / total for share in shares])
        self._held: tuple[int, NDArray[np.int64]] = -1, np.empty((2, 0), np.int64)

    def clip_at(self, position: int) -> int:
        """The clip at a position of the endless stream."""
        epoch, offset = divmod(position, self.num_samples)
        held = self._held
        if epoch != held[0]:
            held = self._held = epoch, self._draw(epoch)
        number, turn = (int(value) for value in held[1][:, offset])
        turn += epoch * self._counts[number]
        return int(self._clips[number][self._orders[number].clip_at(turn)])

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        """(2, num_samples): the set at each place, and its how many-th turn of the epoch it is."""
        generator = np.random.default_rng([self._seed, epoch, _MIXED])
        sets = np.repeat(np.arange(len(self._counts)), self._counts)
        drawn = np.empty((2, self.num_samples), np.int64)
        drawn[0] = generator.permutation(sets)
        for number, count in enumerate(self._counts):
            drawn[1, drawn[0] == number] = np.arange(count)
        return drawn


def make_order(
    sets: NDArray[np.int64],
    videos: NDArray[np.int64] | None,
    weights: Sequence[float] | None,
    clips_per_video: int | None,
    seed: int,
) -> Order:
    """The order that some settings ask for.

    Args:
        sets: (num_clips,) the data set of each clip of the split.
        videos: (num_clips,) a number for each clip's video; needed for ``clips_per_video``.
        weights: share of each set; None takes all clips of all sets alike.
        clips_per_video: largest number of each video's clips in an epoch; None means all.
        seed: of everything.

    Raises:
        DatasetError: a set has no clip in the split.
    """

    def of(clips: NDArray[np.int64], key: int | Sequence[int]) -> Order:
        if clips_per_video is None:
            return Shuffled(len(clips), key)
        assert videos is not None
        return Chosen(videos[clips], clips_per_video, key)

    if weights is None:
        return of(np.arange(len(sets)), seed)
    clips = [np.flatnonzero(sets == number) for number in range(len(weights))]
    empty = [number for number, found in enumerate(clips) if not len(found)]
    if empty:
        raise DatasetError(
            f"data set {empty[0] + 1} of {len(weights)} has no clip in the training split; leave "
            "it out, or change --split_string."
        )
    orders = [of(found, [seed, _SET, number]) for number, found in enumerate(clips)]
    return Mixed(orders, clips, weights, seed)
