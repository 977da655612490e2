"""How well clips are foreseen that the run is not trained on.

Flows in: the validation split, the same batches each time. Flows out: nats and bits per token, the
share of tokens that were the most likely ones, and the nats of each latent frame; the same on every
rank, at every layout. Logits are made some positions at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from cosmos_posttrain.data.batch import Batch, BatchSizes, SequenceLayout, validation_batches
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.prefetch import prefetched
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.models.chunks import ModelChunks, chunks_of
from cosmos_posttrain.models.rope import context_parallel_positions
from cosmos_posttrain.training.scores import guess
from cosmos_posttrain.training.step import forward, run_schedule, sum_of_all_ranks


class Validation:
    """Runs the model over the first ``limit`` global batches of the split.

    Args:
        ddp: the model.
        dataset: the split.
        layout: of the model's sequences.
        sizes: how a global batch is divided.
        limit: largest number of global batches.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel | ModelChunks,
        dataset: TokenDataset,
        layout: SequenceLayout,
        sizes: BatchSizes,
        limit: int,
    ) -> None:
        self._ddp, self._dataset, self._layout = ddp, dataset, layout
        self._sizes, self._limit = sizes, limit
        self._model: CosmosGPTModel | ModelChunks = ddp.module

    def figures(self) -> dict[str, float]:
        """``val_loss`` and its kin, as metrics.jsonl names them.

        Where Medusa heads are trained alone the losses are theirs, and nothing says which tokens
        were the most likely ones.
        """
        sums = torch.zeros(
            3, self._dataset.latent_shape.time, dtype=torch.float64, device=self._device
        )
        self._ddp.eval()
        with torch.no_grad():
            ahead = prefetched(
                validation_batches(self._dataset, self._layout, self._sizes, self._limit)
            )
            # As many at a time as a pipeline has stages, so that all of them work.
            count = parallel_state.get_pipeline_model_parallel_world_size()
            while batches := [batch for some in islice(ahead, count) for batch in some]:
                for part in run_schedule(self._model, batches, self._forward_step, True):
                    sums += part
        self._ddp.train()
        return self._named(sum_of_all_ranks(sums))

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _forward_step(
        self, batches: Iterator[Batch], model: CosmosGPTModel
    ) -> tuple[Tensor, partial[tuple[Tensor, Tensor, Tensor]]]:
        if model.trains_heads_alone:
            losses, batch = forward(batches, model, with_labels=True)
            return losses, partial(self._sums_of_losses, batch)
        with model.hidden_states_only():
            hidden, batch = forward(batches, model, with_labels=False)
        return hidden, partial(self._sums_of_hidden, model, batch)

    def _sums_of_hidden(
        self, model: CosmosGPTModel, batch: Batch, hidden: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, guesses = guess(model, hidden, batch.labels)
        return self._sums(batch, losses, guesses == batch.labels)

    def _sums_of_losses(self, batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._sums(batch, losses, torch.zeros_like(losses))

    def _sums(
        self, batch: Batch, losses: Tensor, is_right: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, nats and right guesses by latent frame, (3, T), as Megatron's schedules want it.

        Sums of products, not scattered ones: those are another at every run on a GPU.
        """
        mask = batch.loss_mask.double()
        rows = torch.stack([part.double() * mask for part in (losses, is_right)])
        by_position = torch.stack([mask.sum(0), *rows.sum(1)])  # (3, S)
        nothing = torch.zeros((), dtype=torch.int, device=mask.device)
        return nothing.float(), nothing, by_position @ self._is_of_latent(mask.device).double()

    def _is_of_latent(self, device: torch.device) -> Tensor:
        """(S, T) bool: to which latent frame the token belongs that a position predicts."""
        length, shape = self._layout.seq_length, self._dataset.latent_shape
        if parallel_state.get_context_parallel_world_size() > 1:
            positions = context_parallel_positions(length, device)
        else:
            positions = torch.arange(length, device=device)
        tokens = positions + 1 - len(self._layout.prefix)
        frames = tokens.div(shape.tokens_per_frame, rounding_mode="floor")
        return frames[:, None] == torch.arange(shape.time, device=device)

    def _named(self, sums: Tensor) -> dict[str, float]:
        counts, nats, num_right = sums.tolist()
        total = max(sum(counts), 1.0)
        loss = sum(nats) / total
        found = {"val_loss": loss, "val_bits_per_token": loss / math.log(2)}
        if not chunks_of(self._model)[-1].trains_heads_alone:
            found["val_top_1"] = sum(num_right) / total
        for frame, (count, value) in enumerate(zip(counts, nats, strict=True)):
            if count:
                found[f"val_loss_latent_{frame}"] = value / count
        return found
