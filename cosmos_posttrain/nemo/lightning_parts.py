"""NeMo's trainer, strategy, precision and loggers with a run's settings.

Flows in: a ``TrainConfig``, and our model and data module. Flows out: a call of
``nemo.collections.llm.api.train``.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig

from cosmos_posttrain import launch
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.nemo.bases import Callback
from cosmos_posttrain.nemo.checkpoints import CosmosCheckpoint
from cosmos_posttrain.runlog import start_wandb
from cosmos_posttrain.training.config import TrainConfig


def make_trainer(config: TrainConfig, dtype: torch.dtype, first: Callback) -> Any:
    """``nl.Trainer`` with ``MegatronStrategy``.

    Args:
        config: the run's.
        dtype: of the model.
        first: Lightning's calls, before all other callbacks.
    """
    import nemo.lightning as nl
    from nemo.lightning.pytorch.callbacks import PreemptionCallback

    on_gpu = torch.cuda.is_available()
    plugins = []
    if dtype == torch.bfloat16:
        plugins.append(
            nl.MegatronMixedPrecision(
                precision="bf16-mixed",
                params_dtype=dtype,
                pipeline_dtype=dtype,
                grad_reduce_in_fp32=not config.optimizer.grad_reduce_in_bf16,
            )
        )
    per_node = launch.local_world_size()
    trainer = nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=per_node,
        num_nodes=launch.world_size() // per_node,
        strategy=_strategy(config, dtype, on_gpu),
        plugins=plugins or None,
        callbacks=[PreemptionCallback()],
        max_steps=config.max_steps,
        # Validation is an item of the run's list of callbacks, and so are the rows of numbers.
        limit_val_batches=0,
        num_sanity_val_steps=0,
        log_every_n_steps=config.max_steps + 1,  # never
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,  # NeMoLogger brings it
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.callbacks.insert(0, first)
    return trainer


def _strategy(config: TrainConfig, dtype: torch.dtype, on_gpu: bool) -> Any:
    import nemo.lightning as nl

    parallel = config.parallel
    num_ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return nl.MegatronStrategy(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        ddp=DistributedDataParallelConfig(
            grad_reduce_in_fp32=not config.optimizer.grad_reduce_in_bf16,
            use_distributed_optimizer=True,
            overlap_grad_reduce=on_gpu and num_ranks > 1,
        ),
        use_gloo_process_groups=on_gpu,
        process_group_backend=None if on_gpu else "gloo",
        ckpt_async_save=False,
        ckpt_optim_fully_reshardable=True,
    )


def run(
    config: TrainConfig,
    folder: Path,
    parts: dict[str, Any],
    checkpoints: CosmosCheckpoint,
    completed_steps: int,
) -> None:
    """Calls ``llm.api.train``.

    Args:
        config: the run's.
        folder: ``LOG_DIR/default``.
        parts: model, data, trainer and how it resumes, by their names there.
        checkpoints: writes them.
        completed_steps: of the run so far; later points of TensorBoard's curves are dropped.
    """
    import nemo.lightning as nl
    from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
    from nemo.collections import llm

    _do_without_resiliency_ext()
    # A folder with that is a run's, whatever NeMo writes into it before the run has begun.
    groups.decide(lambda: (folder / "checkpoints").mkdir(parents=True, exist_ok=True))
    board = TensorBoardLogger(str(folder), "tb_logs", version="", purge_step=completed_steps)
    wandb = None
    if launch.is_rank_zero():
        found = start_wandb(config, folder)
        wandb = None if found is None else WandbLogger(experiment=found)
    log = nl.NeMoLogger(
        name=folder.name,
        log_dir=str(folder.parent),
        use_datetime_version=False,
        update_logger_directory=False,
        ckpt=checkpoints,
        tensorboard=board,
        wandb=wandb,
    )
    llm.api.train(log=log, **parts)


def _do_without_resiliency_ext() -> None:
    """NeMo's logger asks of each callback whether it is nvidia-resiliency-ext's, installed or not.

    Its stand-in for a missing module raises at that.
    """
    from nemo.lightning import nemo_logger
    from nemo.utils.import_utils import UnavailableError

    try:
        _ = nemo_logger.lcp.LocalCheckpointCallback
    except UnavailableError:
        nemo_logger.lcp = SimpleNamespace(LocalCheckpointCallback=())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """NeMo and Lightning say only what went wrong; the run's own lines tell the rest."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
