"""A model with its optimizer, stepped on random gradients: no data, no trainer.

Flows in: a model's numbers and a layout. Flows out: what a run holds, for tests of checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.models.builder import CosmosGPTModel, build_model
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.optimizer import CheckpointableOptimizer, build_optimizer


@dataclass
class TrainingState:
    """What a run holds on this rank."""

    model: CosmosGPTModel
    ddp: DistributedDataParallel
    optimizer: CheckpointableOptimizer

    def step(self, seed: int) -> None:
        """One optimizer step on gradients drawn from ``seed`` (and this rank's number)."""
        generator = torch.Generator().manual_seed(seed + 1000 * torch.distributed.get_rank())
        with cpu_device():
            self.ddp.zero_grad_buffer()
            for parameter in self.model.parameters():
                parameter.main_grad.normal_(generator=generator)
            self.ddp.finish_grad_sync()
            self.optimizer.optimizer.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Copies of this rank's weights and of its part of the optimizer's state, by name."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        copies = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for part in self.optimizer.own_parts():
            for kind, values in part.state.items():
                copies[f"{kind} of {names[id(part.parameter)]}"] = values.clone()
        return copies


def build(
    model: ModelConfig,
    dtype: torch.dtype = torch.float32,
    parallelism: groups.Parallelism | None = None,
    seed: int = 1,
    config: TrainConfig | None = None,
) -> TrainingState:
    """A fresh model with the trainer's optimizer around it, at this layout."""
    groups.initialize(parallelism or groups.Parallelism(), seed)
    module = build_model(model, dtype=dtype, seed=seed)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True
    )
    with cpu_device():
        ddp = DistributedDataParallel(module.config, settings, module)
    optimizer = build_optimizer(config or TrainConfig(), ddp, dtype)
    return TrainingState(module, ddp, CheckpointableOptimizer(optimizer))
