"""The training run, top to bottom: set up, fit, validate, save.

Flows in: a ``TrainConfig``. Flows out: a run folder with checkpoints and metrics. Read ``train``
first, then ``Trainer.fit`` and ``Trainer.train_step``.
"""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint.dist import quiet_megatron_logging
from cosmos_posttrain.checkpoint.source import CheckpointSource, open_source
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.errors import ConfigError, NonFiniteLossError
from cosmos_posttrain.models.builder import CosmosGPTModel, build_model
from cosmos_posttrain.runlog import wants_wandb
from cosmos_posttrain.training import data
from cosmos_posttrain.training.config import TrainConfig, validate
from cosmos_posttrain.training.metrics import MetricsLog, model_flops_utilization
from cosmos_posttrain.training.optimizer import (
    CheckpointableOptimizer,
    build_optimizer,
    build_schedule,
)
from cosmos_posttrain.training.run_folder import Progress, RunFolder
from cosmos_posttrain.training.step import Batch, run_batches, wire_gradients
from cosmos_posttrain.transfer import advice
from cosmos_posttrain.transfer.embedding import Transfer, plan_transfer


def train(config: TrainConfig) -> Path:
    """Runs a post-training job (or goes on with one) and returns its last checkpoint.

    Raises:
        UserError: bad settings, data or checkpoints; raised before anything is written.
        NonFiniteLossError: the loss became NaN or infinite.
    """
    trainer = Trainer(config)
    try:
        return trainer.fit()
    finally:
        trainer.log.close()


class Trainer:
    """Everything that a run holds, set up in the order in which it can fail."""

    def __init__(self, config: TrainConfig) -> None:
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        quiet_megatron_logging()
        validate(config, launch.world_size())
        wants_wandb()
        self.config = config
        self.parallelism = groups.Parallelism(
            config.parallel.tensor_model_parallel_size,
            config.parallel.pipeline_model_parallel_size,
            config.parallel.context_parallel_size,
        )
        self.train_data = data.open_split(config.data, "train")
        self.folder = RunFolder(config.log_dir, data.describe(self.train_data, config.data))
        self.resume_from = self.folder.newest()
        source = self._open_source()
        self.transfer = self._plan_transfer(source)
        self.model_config = source.config if self.transfer is None else self.transfer.config
        self._check_fit()
        self._set_up(source)

    def _open_source(self) -> CheckpointSource:
        """The model to start from, or the run's own last checkpoint, for this data's grid."""
        settings = self.config.model
        return open_source(self.resume_from or settings.path).at_grid(
            self.train_data.latent_shape,
            settings.rope_scaling,
            settings.rope_scale,
            self.train_data.vocab_size,
        )

    def _plan_transfer(self, source: CheckpointSource) -> Transfer | None:
        """Other rows for the new tokens, at the start of a run only; None keeps the rows."""
        settings, vocab_size = self.config.model, self.train_data.vocab_size
        if self.resume_from is None and settings.embedding_init != "keep":
            contract = self.folder.data.contract
            return plan_transfer(
                source,
                settings.embedding_init,
                vocab_size,
                None if contract is None else contract.tokenizer,
                settings.cooccurrence_path,
                settings.seed,
            )
        if source.config.vocab_size != vocab_size:
            raise ConfigError(
                f"the model predicts {source.config.vocab_size} tokens but the data set has a "
                f"vocabulary of {vocab_size}; use a tokenizer with the same number of codes, give "
                "--embedding_init aligned, mean or reset, or start from random:<size>."
            )
        return None

    def _check_fit(self) -> None:
        """Refuses sizes that do not divide, before process groups exist."""
        sizes = self.parallelism
        self.model_config.check_tensor_parallel(sizes.tensor)
        self.model_config.check_pipeline_parallel(sizes.pipeline)
        groups.check_world(sizes)
        length, parallel = self.train_data.seq_length, self.config.parallel
        pieces = (sizes.tensor if parallel.sequence_parallel else 1) * (
            2 * sizes.context if sizes.context > 1 else 1
        )
        if length % pieces:
            raise ConfigError(
                f"a clip of {length} tokens cannot be cut into {pieces} equal pieces for sequence "
                "and context parallelism; choose smaller sizes."
            )

    def _set_up(self, source: CheckpointSource) -> None:
        config = self.config
        groups.initialize(self.parallelism, config.model.seed)
        self.dtype = launch.parse_dtype(config.model.dtype) or (
            torch.bfloat16 if torch.cuda.is_available() else torch.float32
        )
        self.model = self._build()
        self.ddp = self._wrap(self.model)
        optimizer = build_optimizer(config, self.ddp, self.dtype)
        self.optimizer = CheckpointableOptimizer(optimizer)
        self.schedule = build_schedule(config, optimizer)
        wire_gradients(self.ddp, optimizer)
        self.progress = Progress()
        if self.resume_from is not None:
            self.progress = self.folder.restore(
                self.resume_from, self.model, self.optimizer, self.schedule
            )
        else:
            (self.transfer or source).load_weights(self.model)
            optimizer.reload_model_params()
        if self.transfer is not None:
            self.folder.record_transfer(self.transfer.describe())
        self.val_data = self._open_validation()
        self.folder.start(config, self.progress)
        self.log = MetricsLog(config, self.folder.run, self.progress.completed_steps)
        self._announce(source)

    def _build(self) -> CosmosGPTModel:
        recompute: dict[str, Any] = {}
        if self.config.model.recompute:
            recompute = {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            }
        return build_model(
            self.model_config,
            dtype=self.dtype,
            layer_spec=self.config.model.layer_spec,
            sequence_parallel=self.config.parallel.sequence_parallel,
            seed=self.config.model.seed,
            calculate_per_token_loss=True,
            **recompute,
        )

    def _wrap(self, model: CosmosGPTModel) -> DistributedDataParallel:
        on_gpu = torch.cuda.is_available()
        with cpu_device():
            return DistributedDataParallel(
                model.config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    use_distributed_optimizer=True,
                    overlap_grad_reduce=on_gpu,
                ),
                model,
            )

    def _open_validation(self) -> TokenDataset | None:
        shares = self.config.data.split_string.split(",")
        if len(shares) < 2 or float(shares[1]) == 0:
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, for the training split
            split = data.open_split(self.config.data, "validation")
        return split if len(split) else None

    def _announce(self, source: CheckpointSource) -> None:
        config, say = self.config, launch.say
        sizes = self.parallelism
        say(
            f"{self.model_config.num_parameters / 1e6:,.1f}M parameters, "
            f"{len(self.train_data)} training clips of {self.train_data.seq_length} tokens "
            f"{tuple(self.train_data.latent_shape)}, TP {sizes.tensor} PP {sizes.pipeline} "
            f"CP {sizes.context} DP {parallel_state.get_data_parallel_world_size()}, {self.dtype}"
        )
        if self.resume_from is not None:
            say(f"resuming {self.resume_from}")
        elif source.contract is not None and self.folder.data.contract is not None:
            before, after = source.contract.tokenizer, self.folder.data.contract.tokenizer
            if before.sha256 != after.sha256:
                say(f"tokenizer swap: the model saw {before.id}, the data is {after.id}")
        if self.resume_from is None:
            contract = self.folder.data.contract
            tokenizer = None if contract is None else contract.tokenizer
            if advised := advice.sentence(source, tokenizer, self.transfer):
                say(advised)
        steps = math.ceil(config.max_epochs * len(self.train_data) / config.global_batch_size)
        if steps < config.max_steps:
            say(
                f"note: --max_epochs {config.max_epochs} would end after {steps} steps; "
                f"--max_steps {config.max_steps} decides and the data repeats."
            )

    def fit(self) -> Path:
        """Trains up to ``max_steps``; validates and saves on the way and at the end."""
        config = self.config
        batches = data.training_batches(self.train_data, config, self.progress.consumed_samples)
        checkpoint = self.resume_from
        while self.progress.completed_steps < config.max_steps:
            values = self.train_step(next(batches))
            done = self.progress.completed_steps
            last = done == config.max_steps
            if self.val_data is not None and (last or done % self._val_interval == 0):
                values["val_loss"] = self.validate()
            self.log.write(values)
            if last or done % config.save_every_n_steps == 0:
                checkpoint = self.folder.save(
                    config,
                    self.model,
                    self.optimizer,
                    self.progress,
                    len(self.train_data),
                )
                launch.say(f"saved {checkpoint}")
        if checkpoint is not None and checkpoint == self.resume_from:
            launch.say(f"nothing to do: {checkpoint} has {config.max_steps} steps or more")
        assert checkpoint is not None
        return checkpoint

    @property
    def _val_interval(self) -> int:
        return self.config.val_check_interval or self.config.save_every_n_steps

    def train_step(self, batches: list[Batch]) -> dict[str, Any]:
        """One optimizer step on one global batch; returns what metrics.jsonl records of it."""
        started = time.monotonic()
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.optimizer.zero_grad()
        lr = self._lr()
        loss, _ = self._run(batches)
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss is {loss} at step {self.progress.completed_steps}; nothing was updated. "
                "Go on from the last checkpoint with a lower --lr or other data."
            )
        with cpu_device():
            _, grad_norm, _ = self.optimizer.optimizer.step()
        self.schedule.step(increment=1)
        step = self.progress.completed_steps
        self.progress = Progress(
            step + 1, self.progress.consumed_samples + self.config.global_batch_size
        )
        seconds = time.monotonic() - started
        rate = self.config.global_batch_size * self.train_data.seq_length / seconds
        return {
            "step": step,
            "reduced_train_loss": loss,
            "lr": lr,
            "grad_norm": float(grad_norm),
            "consumed_samples": self.progress.consumed_samples,
            "epoch": self.progress.epoch(len(self.train_data)),
            "train_step_seconds": seconds,
            "tokens_per_second": rate,
            "mfu": model_flops_utilization(rate, self.model.model_config),
        }

    def _lr(self) -> float:
        return float(self.optimizer.optimizer.param_groups[0]["lr"])

    def _run(self, batches: list[Batch], forward_only: bool = False) -> tuple[float, int]:
        return run_batches(
            self.ddp,
            batches,
            self.train_data.seq_length,
            self.config.micro_batch_size,
            forward_only,
        )

    def validate(self) -> float:
        """Mean loss in nats per token over the validation clips."""
        assert self.val_data is not None
        self.ddp.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for batches in data.validation_batches(self.val_data, self.config):
                loss, num_tokens = self._run(batches, forward_only=True)
                total += loss * num_tokens
                count += num_tokens
        return total / count
