"""Training and validation batches from a prepared data set.

Flows in: ``TokenDataset`` splits and the data-parallel layout. Flows out: lists of micro-batches,
the same global batch k for every number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from cosmos_posttrain.checkpoint.context import SplitInfo, TrainingData
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.sampler import ClipSampler
from cosmos_posttrain.geometry import parse_latent_shape
from cosmos_posttrain.training.config import DataConfig, TrainConfig
from cosmos_posttrain.training.step import Batch


def open_split(config: DataConfig, split: str) -> TokenDataset:
    """One split of the data set.

    Raises:
        DatasetError: the data is missing, damaged, or needs more settings to be read.
    """
    shape = None if config.latent_shape is None else parse_latent_shape(config.latent_shape)
    return TokenDataset(
        config.path,
        split,
        config.split_string,
        config.seed,
        latent_shape=shape,
        vocab_size=config.vocab_size,
    )


def describe(dataset: TokenDataset, config: DataConfig) -> TrainingData:
    """What a checkpoint records of its data, and what a resumed run must find again."""
    contract = None if dataset.manifest is None else dataset.manifest.contract
    return TrainingData(contract, dataset.fingerprint, SplitInfo(config.split_string, config.seed))


def _rows(dataset: TokenDataset, numbers: list[int]) -> torch.Tensor:
    return torch.stack([dataset[number] for number in numbers])


def training_batches(
    dataset: TokenDataset, config: TrainConfig, consumed_samples: int
) -> Iterator[list[Batch]]:
    """Endless global batches of this rank, from ``consumed_samples`` on."""
    ranks = parallel_state.get_data_parallel_world_size()
    sampler = ClipSampler(
        len(dataset),
        config.micro_batch_size,
        parallel_state.get_data_parallel_rank(),
        ranks,
        consumed_samples,
        config.data.seed,
    )
    num_microbatches = config.global_batch_size // (config.micro_batch_size * ranks)
    weights = torch.ones(config.micro_batch_size)
    numbers = iter(sampler)
    while True:
        yield [Batch(_rows(dataset, next(numbers)), weights) for _ in range(num_microbatches)]


def validation_batches(dataset: TokenDataset, config: TrainConfig) -> Iterator[list[Batch]]:
    """Every clip once, in order, up to ``limit_val_batches`` global batches.

    A last batch that is not full is filled with rows of weight 0, so that all ranks make the same
    number of forward passes.
    """
    ranks = parallel_state.get_data_parallel_world_size()
    rank = parallel_state.get_data_parallel_rank()
    micro = config.micro_batch_size
    num_clips = min(len(dataset), config.limit_val_batches * config.global_batch_size)
    for first in range(0, num_clips, micro * ranks):
        wanted = [first + rank * micro + row for row in range(micro)]
        weights = torch.tensor([float(number < num_clips) for number in wanted])
        yield [Batch(_rows(dataset, [min(n, num_clips - 1) for n in wanted]), weights)]
