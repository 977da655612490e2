"""NeMo's trainer, strategy and precision with a run's settings.

Flows in: a ``TrainConfig``, and our model and data module. Flows out: a call of
``nemo.collections.llm.api.train``, and weights that NeMo reads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig

from cosmos_posttrain import launch
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.nemo.bases import Callback
from cosmos_posttrain.nemo.cluster import LaunchedProcesses
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
    per_node = launch.local_world_size()
    plugins: list[Any] = [LaunchedProcesses(per_node)]
    if dtype == torch.bfloat16:
        plugins.append(
            nl.MegatronMixedPrecision(
                precision="bf16-mixed",
                params_dtype=dtype,
                pipeline_dtype=dtype,
                grad_reduce_in_fp32=not config.optimizer.grad_reduce_in_bf16,
            )
        )
    trainer = nl.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=per_node,
        num_nodes=launch.world_size() // per_node,
        strategy=_strategy(config, dtype, on_gpu),
        plugins=plugins,
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


def run(**parts: Any) -> None:
    """Calls ``llm.api.train``.

    Args:
        **parts: model, data, trainer, log and how it resumes, by their names there.

    Raises:
        KeyboardInterrupt: at Ctrl-C, for which Lightning ends the process with 1.
    """
    from nemo.collections import llm

    _do_without_resiliency_ext()
    try:
        with _as_many_threads():
            llm.api.train(**parts)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


@contextlib.contextmanager
def _as_many_threads() -> Iterator[None]:
    """Lightning leaves the number of threads alone only where this variable says one."""
    name = "OMP_NUM_THREADS"
    before = os.environ.get(name)
    os.environ.setdefault(name, str(torch.get_num_threads()))
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]


def restore(strategy: Any) -> None:
    """NeMo reads the weights that ``AutoResume`` has named, at once; the optimizer follows later.

    Args:
        strategy: NeMo's, which has built and wrapped the model.

    Raises:
        CheckpointError: they cannot be read.
    """
    path = strategy.restore_config.path
    try:
        strategy.selective_restore()
    except Exception as error:  # what torch, Megatron or NeMo make of damaged files
        said = (str(error).strip().splitlines() or [repr(error)])[0].rstrip(".")
        raise CheckpointError(
            f"{path} cannot be read by NeMo ({said}); restore the checkpoint."
        ) from error
    strategy.restore_config = None  # else it is read once more


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
