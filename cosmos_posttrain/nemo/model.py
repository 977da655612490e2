"""Our model as a Lightning module that NeMo trains, saves and loads.

Flows in: a ``CosmosConfig``. Flows out: losses per token (B, S), and how they become the mean over
the global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from cosmos_posttrain.data.batch import Batch
from cosmos_posttrain.distributed.cpu_device import cuda_calls_mean_cpu, plain_torch
from cosmos_posttrain.models.gpt_model import CosmosGPTModel
from cosmos_posttrain.nemo.bases import IOMixin, LightningModule, MegatronLossReduction
from cosmos_posttrain.nemo.config import CosmosConfig
from cosmos_posttrain.nemo.connector import Connected
from cosmos_posttrain.training.step import own_part


class CosmosLoss(MegatronLossReduction):
    """The mean over the predicted tokens of the global batch."""

    def forward(self, batch: Batch, losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum and number of tokens, by which Megatron divides, and both again for ``reduce``."""
        total, count = (losses.float() * batch.loss_mask).sum(), batch.loss_mask.sum()
        return total, count.to(torch.int), torch.stack([total.detach(), count])

    def reduce(self, outputs: list[Tensor]) -> Tensor:
        """Over the micro-batches and the ranks with other clips or positions."""
        sums = torch.stack(outputs).sum(0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(sums, group=group)
        return sums[0] / sums[1].clamp(min=1)


class CosmosModel(Connected, LightningModule, IOMixin):
    """A Cosmos model in NeMo's hands.

    Args:
        config: the model's numbers.
        optim: NeMo's optimizer module.
        tokenizer: NeMo's models have one; ours never reads text, and takes None.
    """

    def __init__(self, config: CosmosConfig, optim: Any = None, tokenizer: Any = None) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        if optim is not None:
            optim.connect(self)
        self._beside: list[Any] = [CosmosLoss()]  # no part of what Lightning sees as the model

    @property
    def training_loss_reduction(self) -> CosmosLoss:
        """NeMo looks for it on the class."""
        loss: CosmosLoss = self._beside[0]
        return loss

    @property
    def bare_module(self) -> CosmosGPTModel:
        """This rank's part of the model, without what NeMo wraps around it."""
        module: CosmosGPTModel = self._beside[1]
        return module

    def configure_model(self, vp_stage: int | None = None) -> None:
        """Builds this rank's part of the model, once."""
        if hasattr(self, "module"):
            return
        with plain_torch():
            self.module = self.config.configure(vp_stage)
        self._beside.append(self.module)
        # NeMo finishes gradients by the former, Megatron by the latter.
        self.config = self.module.config

    def data_step(self, batches: Iterator[Any]) -> Batch:
        """The next micro-batch, of which this context-parallel rank takes its part."""
        return own_part(next(batches)[0], next(self.bare_module.parameters()).device)

    def training_step(self, batch: Batch, number: int | None = None) -> Tensor:
        """Losses (B, S) of a micro-batch on the last pipeline stage, hidden states on others."""
        more = {} if batch.context is None else {"context": batch.context}
        with plain_torch(), cuda_calls_mean_cpu():
            output: Tensor = self.module(batch.tokens, None, None, labels=batch.labels, **more)
        return output

    forward_step = training_step  # NeMo's name for it on all pipeline stages but the last
