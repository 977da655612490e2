"""The order in which clips are trained on: a pure function of seed, epoch and consumed samples.

Flows in: the number of clips, the batch layout and how many samples were consumed. Flows out:
micro batches of clip numbers for one data-parallel rank, without end.

All epochs in a row, each with its own permutation (see ``order.py``), form one global stream. A
step of all ranks takes the next ``micro_batch_size * data_parallel_size`` numbers, rank by rank, so
global batch k is the same set of clips for any number of ranks, and resuming means starting further
on.
"""

from __future__ import annotations

from collections.abc import Iterator

from cosmos_posttrain.data.order import Order, Shuffled
from cosmos_posttrain.errors import ConfigError, DatasetError


class ClipSampler:
    """Endless micro batches of clip numbers; give it to a DataLoader as ``batch_sampler``.

    Args:
        num_samples: clips in the split.
        micro_batch_size: clips in one forward pass of one rank.
        data_parallel_rank: this rank, in [0, data_parallel_size).
        data_parallel_size: ranks that train on different clips.
        consumed_samples: samples that all ranks together have trained on; where to start.
        seed: of the permutations.
        order: another order than all clips once in each epoch; it has its own seed.

    Raises:
        DatasetError: there is no clip.
        ConfigError: a size or rank that makes no sense.
    """

    def __init__(
        self,
        num_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        consumed_samples: int = 0,
        seed: int = 1234,
        order: Order | None = None,
    ) -> None:
        if num_samples < 1:
            raise DatasetError("the split holds no clip; change --split_string or add videos.")
        if micro_batch_size < 1 or not 0 <= data_parallel_rank < data_parallel_size:
            raise ConfigError(
                f"micro batch {micro_batch_size} on rank {data_parallel_rank} of "
                f"{data_parallel_size} makes no sense; sizes must be at least 1."
            )
        if consumed_samples < 0:
            raise ConfigError(f"consumed_samples is {consumed_samples}; it must be at least 0.")
        self.num_samples = num_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.data_parallel_size = data_parallel_size
        self.consumed_samples = consumed_samples
        self.seed = seed
        self.order: Order = order or Shuffled(num_samples, seed)

    def sample_at(self, position: int) -> int:
        """The clip at a position of the endless global stream."""
        return self.order.clip_at(position)

    def positions(self) -> Iterator[list[int]]:
        """Positions in the endless global stream, a micro batch of this rank at a time."""
        position = self.consumed_samples + self.data_parallel_rank * self.micro_batch_size
        while True:
            yield [position + offset for offset in range(self.micro_batch_size)]
            position += self.micro_batch_size * self.data_parallel_size

    def __iter__(self) -> Iterator[list[int]]:
        for positions in self.positions():
            yield [self.sample_at(position) for position in positions]
