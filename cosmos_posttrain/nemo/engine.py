"""A run by NeMo's trainer.

Flows in: a ``TrainConfig``. Flows out: a run folder.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from cosmos_posttrain.distributed import groups
from cosmos_posttrain.nemo import extra
from cosmos_posttrain.nemo.bases import Callback
from cosmos_posttrain.nemo.config import CosmosConfig
from cosmos_posttrain.nemo.data import CosmosData
from cosmos_posttrain.nemo.device import nemo_device
from cosmos_posttrain.nemo.model import CosmosModel
from cosmos_posttrain.nemo.optimizer import make_optimizer
from cosmos_posttrain.training import building, setup
from cosmos_posttrain.training.config import TrainConfig


class _Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.values.append(float(trainer.callback_metrics["reduced_train_loss"]))


def _trainer(config: TrainConfig, losses: _Losses) -> Any:
    import nemo.lightning as nl

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


def train(config: TrainConfig, takes_text: bool = False) -> list[float]:
    """Runs a post-training job; returns the loss of each step."""
    extra.check()
    import nemo.lightning as nl
    from nemo.collections import llm

    losses = _Losses()
    with contextlib.ExitStack() as closing:
        inputs = setup.open_inputs(config, closing, takes_text)
        groups.initialize(inputs.parallelism, config.model.seed)
        dtype = building.training_dtype(config)
        with nemo_device():
            log = nl.NeMoLogger(log_dir=config.log_dir, ckpt=None, use_datetime_version=False)
            settings = CosmosConfig.of(
                inputs.model_config,
                dtype,
                init_seed=config.model.seed,
                calculate_per_token_loss=True,
            )
            model = CosmosModel(settings, make_optimizer(config, dtype))
            model.fill = inputs.load_weights
            data = CosmosData(config, inputs)
            llm.api.train(model=model, data=data, trainer=_trainer(config, losses), log=log)
    return losses.values
