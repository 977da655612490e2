"""The direct engine's model, batches and schedule under NeMo's trainer: the ground of an adapter.

Flows in: a ``TrainConfig``. Flows out: the losses of a run by ``nemo.collections.llm``, without
checkpoints. docs/nemo.md says why each thing is as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import nemo.lightning as nl
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.lightning.megatron_parallel import MegatronLossReduction
from nemo.lightning.pytorch.optim import MegatronOptimizerModule
from nemo.lightning.pytorch.optim.base import LRSchedulerModule
from torch.overrides import TorchFunctionMode

from cosmos_posttrain.data.batch import Batch, BatchSizes, training_batches
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cpu_device, cuda_calls_mean_cpu, plain_torch
from cosmos_posttrain.models.builder import build_model, transformer_config
from cosmos_posttrain.models.sequence import sequence_layout
from cosmos_posttrain.training import building, setup
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.schedule import Schedule, min_lr


class _NothingPinned(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        return func(*args, **kwargs)


@contextlib.contextmanager
def nemo_on_cpu() -> Iterator[None]:
    """NeMo's CUDA calls mean the CPU inside."""
    with (
        patch.object(torch.cuda, "Stream", lambda *_: None),
        patch.object(torch.cuda, "stream", lambda *_: contextlib.nullcontext()),
        patch.object(tensor_parallel, "model_parallel_cuda_manual_seed", lambda *_, **__: None),
        cpu_device(),
        _NothingPinned(),
    ):
        yield


class Loss(MegatronLossReduction):
    """The mean over the predicted tokens of the global batch."""

    def forward(self, batch: Batch, losses: torch.Tensor) -> tuple[torch.Tensor, ...]:
        total, count = (losses.float() * batch.loss_mask).sum(), batch.loss_mask.sum()
        return total, count.to(torch.int), torch.stack([total.detach(), count])

    def reduce(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        sums = torch.stack(outputs).sum(0)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(sums, group=group)
        return sums[0] / sums[1]


class _Steps(torch.optim.lr_scheduler.LRScheduler):
    def __init__(self, optimizer: Any, schedule: Schedule) -> None:
        self.optimizer, self._schedule = optimizer, schedule

    def step(self, epoch: int | None = None) -> None:
        self._schedule.step(increment=1)


class Scheduler(LRSchedulerModule):
    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.run = config

    def scheduler(self, model: Any, optimizer: Any) -> dict[str, Any]:
        steps = _Steps(optimizer, Schedule(self.run, optimizer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": steps, "interval": "step"}}


class Optimizer(MegatronOptimizerModule):
    """NeMo's, with the multipliers by the names that Megatron's schedule reads."""

    def optimizers(self, model: Any) -> list[Any]:
        found = super().optimizers(model)
        for group in (group for optimizer in found for group in optimizer.param_groups):
            group["wd_mult"] = group.get("pre_wd_mult", 1.0)
            group["lr_mult"] = group.get("pre_lr_mult", 1.0)
        return found


class CosmosModule(pl.LightningModule):
    def __init__(self, config: TrainConfig, inputs: setup.Inputs, optim: Optimizer) -> None:
        super().__init__()
        self.run, self.inputs = config, inputs
        self.settings: dict[str, Any] = {
            "dtype": building.training_dtype(config),
            "sequence_parallel": config.parallel.sequence_parallel,
            "calculate_per_token_loss": True,
        }
        self.config = transformer_config(inputs.model_config, **self.settings)
        self.optim = optim
        optim.connect(self)
        self._loss = [Loss()]  # no part of the model

    @property
    def training_loss_reduction(self) -> Loss:
        return self._loss[0]

    def configure_model(self, vp_stage: int | None = None) -> None:
        if hasattr(self, "module"):
            return
        with plain_torch():
            seed = self.run.model.seed
            self.module = build_model(self.inputs.model_config, seed=seed, **self.settings)
            self.inputs.load_weights(self.module)
        self.config = self.module.config

    def data_step(self, batches: Iterator[Any]) -> Batch:
        return next(batches)[0]

    def training_step(self, batch: Batch, number: int | None = None) -> torch.Tensor:
        with plain_torch(), cuda_calls_mean_cpu():
            return self.module(batch.tokens, None, None, labels=batch.labels)


class _Clips(torch.utils.data.IterableDataset):
    def __init__(self, data: Clips) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        for batches in self.data.global_batches():
            yield from batches


class Clips(pl.LightningDataModule):
    """Our batches, and the sampler that NeMo asks for."""

    dataloader_type = "single"

    def __init__(self, config: TrainConfig, inputs: setup.Inputs) -> None:
        super().__init__()
        self.run, self.inputs, self.data_sampler = config, inputs, self
        self.layout = sequence_layout(inputs.model_config, config.num_condition_latents)
        self.seq_length = self.layout.seq_length
        place = groups.data_parallel_place()
        self.sizes = BatchSizes(config.global_batch_size, config.micro_batch_size, *place)

    def global_batches(self) -> Iterator[list[Batch]]:
        inputs, seed = self.inputs, self.run.data.seed
        data, order = inputs.train_data, inputs.order
        return training_batches(data, self.layout, self.sizes, 0, seed, order=order)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(_Clips(self), batch_size=None)

    def connect(self, trainer: Any) -> None:
        """Nothing to know of the trainer."""

    def transform_dataloader(self, loader: Any, consumed_samples: int = 0) -> Any:
        return loader

    def on_megatron_step_start(self, step: Any) -> Any:
        return dataclasses.replace(
            step,
            seq_length=self.seq_length,
            micro_batch_size=self.sizes.micro_batch_size,
            num_microbatches=self.sizes.num_microbatches,
        )


class _Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["reduced_train_loss"]))


def _optimizer(config: TrainConfig) -> Optimizer:
    settings = config.optimizer
    names = ("lr", "weight_decay", "adam_beta1", "adam_beta2", "adam_eps", "clip_grad")
    megatron = OptimizerConfig(
        optimizer="adam",
        min_lr=min_lr(settings),
        params_dtype=torch.float32,
        use_distributed_optimizer=True,
        **{name: getattr(settings, name) for name in names},
    )
    return Optimizer(megatron, lr_scheduler=Scheduler(config))


def _trainer(config: TrainConfig, losses: _Losses) -> Any:
    strategy = nl.MegatronStrategy(
        tensor_model_parallel_size=config.parallel.tensor_model_parallel_size,
        use_gloo_process_groups=False,
        process_group_backend="gloo",
        ckpt_async_save=False,
        pipeline_dtype=torch.float32,
    )
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return nl.Trainer(
        accelerator="cpu",
        devices=torch.distributed.get_world_size(),
        strategy=strategy,
        max_steps=config.max_steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[losses],
        **dict.fromkeys(off, False),
    )


def train_with_nemo(config: TrainConfig) -> list[float]:
    """Trains in float32 on the CPU; returns the loss of each step."""
    losses = _Losses()
    with contextlib.ExitStack() as closing:
        inputs = setup.open_inputs(config, closing)
        groups.initialize(inputs.parallelism, config.model.seed)
        with nemo_on_cpu():
            log = nl.NeMoLogger(log_dir=config.log_dir, ckpt=None, use_datetime_version=False)
            module = CosmosModule(config, inputs, _optimizer(config))
            trainer = _trainer(config, losses)
            llm.api.train(model=module, data=Clips(config, inputs), trainer=trainer, log=log)
    return losses.values
