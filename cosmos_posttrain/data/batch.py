"""Clips to batches, for every kind of model.

Flows in: clips as token sequences and how a model wants them laid out. Flows out, on the CPU:

    clips (B, T*H*W) --SequenceLayout--> Batch(tokens, labels (B, S), loss_mask (B, S), context)

Global batch k is the same for every number of ranks and size of micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.order import Order
from cosmos_posttrain.data.sampler import ClipSampler

_DROPOUT = 1  # so that these draws are no others'


@dataclass(frozen=True)
class Batch:
    """One micro-batch.

    Attributes:
        tokens: (B, S) int64, what the model reads.
        labels: (B, S) int64, the token after each; any value where there is no loss.
        loss_mask: (B, S) float32, 1 where the loss counts.
        context: (B, L, context_dim) float32, what the model attends to; None for a model that
            takes nothing but tokens.
    """

    tokens: Tensor
    labels: Tensor
    loss_mask: Tensor
    context: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        context = None if self.context is None else self.context.to(device, non_blocking=True)
        return self._map(lambda tensor: tensor.to(device, non_blocking=True), context)

    def pinned(self) -> Batch:
        """The batch in memory from which a GPU copies without waiting."""
        context = None if self.context is None else self.context.pin_memory()
        return self._map(lambda tensor: tensor.pin_memory(), context)

    def at(self, positions: Tensor) -> Batch:
        """The part of the sequence at some positions, (n,) int64; the context is whole."""
        return self._map(lambda tensor: tensor[:, positions], self.context)

    def _map(self, function: Callable[[Tensor], Tensor], context: Tensor | None) -> Batch:
        parts = (self.tokens, self.labels, self.loss_mask)
        tokens, labels, loss_mask = (function(part) for part in parts)
        return Batch(tokens, labels, loss_mask, context)


@dataclass(frozen=True)
class SequenceLayout:
    """How a clip's tokens become a sequence: ``prefix``, the clip, and padding.

    Attributes:
        seq_length: positions of a sequence.
        prefix: tokens before the clip (``<bov>`` of a Video2World model).
        pad_token: behind it.
        num_given: first tokens of the clip on which there is no loss.
    """

    seq_length: int
    prefix: tuple[int, ...] = ()
    pad_token: int = 0
    num_given: int = 0

    def batch(self, clips: Tensor, weights: Tensor, context: Tensor | None = None) -> Batch:
        """Lays clips out; the loss is on clip tokens that something comes before, given ones not.

        Args:
            clips: (B, T * H * W) int64.
            weights: (B,) float32; 0 for rows that only fill up a last batch.
            context: (B, L, context_dim), see ``Batch``.
        """
        size, num_tokens = clips.shape
        first = len(self.prefix)
        tokens = clips.new_full((size, self.seq_length), self.pad_token)
        tokens[:, :first] = torch.tensor(self.prefix, dtype=clips.dtype)
        tokens[:, first : first + num_tokens] = clips
        # The last position predicts nothing, so that S stays a multiple of every parallel size.
        labels = tokens.roll(-1, dims=1)
        loss_mask = torch.zeros(tokens.shape)
        predicting = slice(max(first + self.num_given - 1, 0), first + num_tokens - 1)
        loss_mask[:, predicting] = weights[:, None].float()
        if self.prefix:  # tokens that are read but never predicted have no loss, not even times 0
            labels = labels.masked_fill(loss_mask == 0, 0)
        return Batch(tokens, labels, loss_mask, context)


@dataclass(frozen=True)
class BatchSizes:
    """How a global batch is divided.

    Attributes:
        global_batch_size: clips of an optimizer step.
        micro_batch_size: clips of a forward pass of one rank.
        rank: this data-parallel rank.
        num_ranks: data-parallel ranks.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int = 0
    num_ranks: int = 1

    @property
    def num_microbatches(self) -> int:
        """Forward passes of one rank and step."""
        return self.global_batch_size // (self.micro_batch_size * self.num_ranks)


def make_batch(
    layout: SequenceLayout,
    dataset: TokenDataset,
    numbers: list[int],
    weights: Tensor,
    is_dropped: list[bool] | None = None,
) -> Batch:
    """Clips with their texts; a dropped text is the null context, all rows zero."""
    clips = torch.stack([dataset[number] for number in numbers])
    texts = [dataset.context(number) for number in numbers]
    if texts[0] is None:
        return layout.batch(clips, weights)
    context = torch.stack([text for text in texts if text is not None])
    if is_dropped is not None:
        context[torch.tensor(is_dropped)] = 0
    return layout.batch(clips, weights, context)


def drops_prompt(position: int, seed: int, probability: float) -> bool:
    """Whether the sample at a position of the global stream is trained without its text."""
    if probability == 0:
        return False
    return bool(np.random.default_rng([seed, position, _DROPOUT]).random() < probability)


def training_batches(
    dataset: TokenDataset,
    layout: SequenceLayout,
    sizes: BatchSizes,
    consumed_samples: int,
    seed: int,
    prompt_dropout: float = 0.0,
    order: Order | None = None,
) -> Iterator[list[Batch]]:
    """Endless global batches of this rank, from ``consumed_samples`` on.

    Args:
        dataset: the clips.
        layout: of the model's sequences.
        sizes: how a global batch is divided.
        consumed_samples: samples that all ranks together have trained on; where to start.
        seed: of the order of the clips, and of the dropped texts.
        prompt_dropout: probability of a sample to be trained without its text.
        order: of the clips; None is all of them once in each epoch.
    """
    sampler = ClipSampler(
        len(dataset),
        sizes.micro_batch_size,
        sizes.rank,
        sizes.num_ranks,
        consumed_samples,
        seed,
        order,
    )
    weights = torch.ones(sizes.micro_batch_size)
    samples = sampler.positions()
    while True:
        batches = []
        for _ in range(sizes.num_microbatches):
            positions = next(samples)
            numbers = [sampler.sample_at(position) for position in positions]
            dropped = [drops_prompt(position, seed, prompt_dropout) for position in positions]
            batches.append(make_batch(layout, dataset, numbers, weights, dropped))
        yield batches


def clip_names(dataset: TokenDataset, order: Order, first: int, count: int) -> list[str]:
    """What ``count`` samples of ``training_batches`` are, from position ``first`` on."""
    rows = (dataset.row(order.clip_at(first + number)) for number in range(count))
    return [f"{row.source} (from frame {row.first_frame})" for row in rows]


def validation_batches(
    dataset: TokenDataset, layout: SequenceLayout, sizes: BatchSizes, limit: int
) -> Iterator[list[Batch]]:
    """Every clip once, in order, up to ``limit`` global batches.

    A last batch that is not full is filled with rows of weight 0, so that all ranks make the same
    number of forward passes.
    """
    micro = sizes.micro_batch_size
    num_clips = min(len(dataset), limit * sizes.global_batch_size)
    for first in range(0, num_clips, micro * sizes.num_ranks):
        wanted = [first + sizes.rank * micro + row for row in range(micro)]
        weights = torch.tensor([float(number < num_clips) for number in wanted])
        numbers = [min(number, num_clips - 1) for number in wanted]
        yield [make_batch(layout, dataset, numbers, weights)]
