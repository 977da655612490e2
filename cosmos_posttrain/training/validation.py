"""The loss on clips that the run is not trained on.

Flows in: the validation split. Flows out: nats per token, the same on every rank.
"""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel

from cosmos_posttrain.data.batch import BatchSizes, SequenceLayout, validation_batches
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.prefetch import prefetched
from cosmos_posttrain.training.step import run_batches


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
        ddp: DistributedDataParallel,
        dataset: TokenDataset,
        layout: SequenceLayout,
        sizes: BatchSizes,
        limit: int,
    ) -> None:
        self._ddp, self._dataset, self._layout = ddp, dataset, layout
        self._sizes, self._limit = sizes, limit

    def loss(self) -> float:
        """Mean loss in nats per predicted token."""
        self._ddp.eval()
        total, count = 0.0, 0.0
        with torch.no_grad():
            for batches in prefetched(
                validation_batches(self._dataset, self._layout, self._sizes, self._limit)
            ):
                loss, num_tokens = run_batches(self._ddp, batches, forward_only=True)
                total += float(loss) * float(num_tokens)
                count += float(num_tokens)
        self._ddp.train()
        return total / count
