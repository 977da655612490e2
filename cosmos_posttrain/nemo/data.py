"""Batches as NeMo asks for them.

Flows in: global batches of this rank, from where the run is. Flows out: a Lightning data module
that is its own sampler, and yields one micro-batch at a time. The order is the direct engine's: a
pure function of seed and consumed samples; NeMo's own counts have no part in it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cosmos_posttrain.data.batch import Batch, BatchSizes
from cosmos_posttrain.nemo.bases import LightningDataModule


class _Stream(torch.utils.data.IterableDataset):
    """Micro-batches without end."""

    def __init__(self, data: CosmosData) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Batch]:
        return self._data.micro_batches()


class CosmosData(LightningDataModule):
    """Our batches, and the sampler that NeMo asks for.

    Args:
        batches: called once, gives global batches without end.
        sizes: how a global batch is divided.
        seq_length: positions of a sequence.

    Attributes:
        waited_seconds: for the last global batch.
    """

    dataloader_type = "single"

    def __init__(
        self, batches: Callable[[], Iterator[list[Batch]]], sizes: BatchSizes, seq_length: int
    ) -> None:
        super().__init__()
        self._batches, self._sizes = batches, sizes
        self.seq_length = seq_length  # telemetry reads it
        self.waited_seconds = 0.0
        # The strategy takes it from here: what hangs on the trainer itself is copied deeply.
        self.data_sampler = self

    def micro_batches(self) -> Iterator[Batch]:
        """Of this data-parallel rank."""
        source = self._batches()
        while True:
            started = time.monotonic()
            batches = next(source)
            self.waited_seconds = time.monotonic() - started
            yield from batches

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        """The training split."""
        return torch.utils.data.DataLoader(_Stream(self), batch_size=None)

    def connect(self, trainer: Any) -> None:
        """Nothing to know of the trainer."""

    def transform_dataloader(self, loader: Any, consumed_samples: int = 0) -> Any:
        """The loader as it is: its batches are this rank's already."""
        return loader

    def on_megatron_step_start(self, step: Any) -> Any:
        """Tells a step how large it is."""
        return dataclasses.replace(
            step,
            seq_length=self.seq_length,
            micro_batch_size=self._sizes.micro_batch_size,
            num_microbatches=self._sizes.num_microbatches,
        )
