"""The direct engine's batches as NeMo asks for them: a pure function of seed and consumed samples.

Flows in: the data set, its order, and how a global batch is divided. Flows out: a Lightning data
module that is its own sampler: items are ``(batch, number, number)``, the batch a micro-batch of
this data-parallel rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from cosmos_posttrain.data.batch import Batch, BatchSizes, training_batches
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.models.sequence import sequence_layout
from cosmos_posttrain.nemo.bases import LightningDataModule
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.setup import Inputs


class _Stream(torch.utils.data.IterableDataset):
    """Micro-batches without end."""

    def __init__(self, data: CosmosData) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Batch]:
        for batches in self._data.global_batches():
            yield from batches


class CosmosData(LightningDataModule):
    """Our batches, and the sampler that NeMo asks for; process groups must exist.

    Args:
        config: the run's.
        inputs: what it starts from.
        consumed_samples: samples that all ranks together have trained on; where to start.
    """

    dataloader_type = "single"

    def __init__(self, config: TrainConfig, inputs: Inputs, consumed_samples: int = 0) -> None:
        super().__init__()
        self.run, self.inputs, self.consumed_samples = config, inputs, consumed_samples
        # The strategy takes it from here: what hangs on the trainer itself is copied deeply.
        self.data_sampler = self
        self.layout = sequence_layout(inputs.model_config, config.num_condition_latents)
        self.seq_length = self.layout.seq_length  # telemetry reads it
        place = groups.data_parallel_place()
        self.sizes = BatchSizes(config.global_batch_size, config.micro_batch_size, *place)

    def global_batches(self) -> Iterator[list[Batch]]:
        """This rank's, from where the run is, without end."""
        return training_batches(
            self.inputs.train_data,
            self.layout,
            self.sizes,
            self.consumed_samples,
            self.run.data.seed,
            self.run.prompt_dropout,
            self.inputs.order,
        )

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
            micro_batch_size=self.sizes.micro_batch_size,
            num_microbatches=self.sizes.num_microbatches,
        )
