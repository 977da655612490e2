"""The training run, top to bottom: set up, fit, save.

Flows in: a ``TrainConfig``. Flows out: a run folder with checkpoints and metrics. Read ``train``
first, then ``Trainer.fit`` and ``Trainer.train_step``; what else happens is in ``callbacks``.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.data.batch import Batch, BatchSizes, clip_names, training_batches
from cosmos_posttrain.data.prefetch import prefetched
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.watch import RankWatch
from cosmos_posttrain.errors import (
    CheckpointError,
    NonFiniteLossError,
    StoppedError,
    UnreadableCheckpointError,
)
from cosmos_posttrain.models.chunks import chunks_of
from cosmos_posttrain.models.sequence import sequence_layout
from cosmos_posttrain.training import building, setup
from cosmos_posttrain.training import optimizer as optimizers
from cosmos_posttrain.training.callbacks import Callback, make_callbacks
from cosmos_posttrain.training.callbacks.log import Log
from cosmos_posttrain.training.callbacks.samples import make_samples
from cosmos_posttrain.training.callbacks.save import Save
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.gradients import forget_gradients
from cosmos_posttrain.training.metrics import StepMeter
from cosmos_posttrain.training.run_folder import TrainState, saved_row
from cosmos_posttrain.training.saving import Saver
from cosmos_posttrain.training.schedule import Schedule
from cosmos_posttrain.training.step import run_batches, wire_gradients
from cosmos_posttrain.training.validation import Validation


def train(config: TrainConfig, takes_text: bool = False) -> Path:
    """Runs a post-training job (or goes on with one) and returns its last checkpoint.

    Args:
        config: the run's.
        takes_text: train a Video2World model on data with prompts; else a base model.

    Raises:
        UserError: bad settings, data or checkpoints; raised before anything is written.
        NonFiniteLossError: a loss, gradient or weight became NaN or infinite.
        StoppedError: a signal ended the run, after it was saved.
        SaveError: a checkpoint could not be written.
    """
    with contextlib.closing(Trainer(config, takes_text)) as trainer:
        return trainer.fit()


class Trainer:
    """Everything that a run holds, set up in the order in which it can fail.

    Attributes:
        state: how far the run is.
        stop_reason: why it ends before its last step; None while it goes on.
        callbacks: what happens after each step, in order.
    """

    def __init__(self, config: TrainConfig, takes_text: bool = False) -> None:
        self.config = config
        self.takes_text = takes_text
        self.state = TrainState()
        self.stop_reason: str | None = None
        self.callbacks: list[Callback] = []
        self.watch: RankWatch | None = None
        self._closing = contextlib.ExitStack()
        with contextlib.ExitStack() as on_error:
            on_error.callback(self.close)
            self.inputs = setup.open_inputs(config, self._closing, self.takes_text)
            self.watch = RankWatch(config.distributed_timeout_minutes)
            with self.watch.explaining():
                self._set_up()
            on_error.pop_all()

    def _set_up(self) -> None:
        """Process groups, then the model, then what goes around it."""
        config, inputs = self.config, self.inputs
        self.train_data, self.folder = inputs.train_data, inputs.folder
        groups.initialize(inputs.parallelism, config.model.seed)
        self.dtype = building.training_dtype(config)
        self.layout = sequence_layout(inputs.model_config, config.num_condition_latents)
        self.sizes = BatchSizes(
            config.global_batch_size,
            config.micro_batch_size,
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
        )
        self._build()

    def _build(self) -> None:
        config = self.config
        self.model = building.build(config, self.inputs.model_config, self.dtype)
        self.ddp = building.wrap(
            self.model,
            not config.optimizer.grad_reduce_in_bf16,
            config.parallel.overlap_param_gather,
        )
        self.optimizer = optimizers.CheckpointableOptimizer(
            optimizers.build_optimizer(config, self.ddp, self.dtype),
            has_average=config.optimizer.ema_decay is not None,
        )
        wire_gradients(self.ddp, self.optimizer.optimizer)
        self._surround()

    def _surround(self) -> None:
        """Gives a built model its weights, and the run all that is made around the model."""
        config, inputs = self.config, self.inputs
        self.schedule = Schedule(config, self.optimizer.optimizer)
        self.meter = StepMeter(
            self.optimizer.optimizer,
            self.model.model_config,
            config.global_batch_size,
            self.train_data.seq_length,
            config.model.num_medusa_heads > 0 and config.model.medusa_freeze_backbone,
        )
        kept = self._load()
        self.saver = self._make_saver()
        self.folder.start(config, self.saver.num_bytes, self.resume_from)
        self.saver.prepare()
        self._closing.callback(self.saver.close)
        self.log = self._make_log()
        validation = None
        if inputs.val_data is not None:
            limit = config.limit_val_batches
            validation = Validation(self.ddp, inputs.val_data, self.layout, self.sizes, limit)
        samples = make_samples(config.samples, inputs, self.ddp, self.layout, self.log)
        self.callbacks = make_callbacks(config, self.optimizer, validation, samples, self.log)
        for callback in self.callbacks:
            callback.state = kept.get(type(callback).__name__, {})
        setup.announce(config, inputs, self.dtype)

    def _make_saver(self) -> Saver:
        return Saver(self.config, self.folder, self.model, self.optimizer)

    def _make_log(self) -> Log:
        return Log(self.config, self.folder.run, self.state.completed_steps)

    def _load(self) -> dict[str, Any]:
        """Weights, and for a resumed run all the rest; returns what its callbacks kept."""
        if self.resume_from is None:
            self.inputs.load_weights(self.model)
            self.optimizer.take_weights()
            return {}
        saved = None
        while saved is None:
            try:
                saved = self.folder.restore(self.resume_from, self.model, self.optimizer)
            except UnreadableCheckpointError:
                raise  # it may be whole
            except CheckpointError as error:  # on every rank alike
                self.inputs.resume_from = self.folder.fall_back(self.resume_from, error)
        return self._go_on(saved)

    def _go_on(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Takes up a checkpoint's ``state.json``; returns what its callbacks kept."""
        self.state = TrainState(saved["completed_steps"], saved["consumed_samples"])
        self.schedule.step(increment=self.completed_steps)
        kept: dict[str, Any] = saved.get("callbacks", {})
        return kept

    def close(self) -> None:
        """Closes the callbacks and lets others write into the folder; safe to call twice."""
        if self.watch is not None:
            self.watch.close()
        for callback in self.callbacks:
            callback.close()
        self.callbacks = []
        self._closing.close()

    @property
    def resume_from(self) -> Path | None:
        """The run's own checkpoint that it began with; None for a new run."""
        return self.inputs.resume_from

    @property
    def completed_steps(self) -> int:
        """Optimizer steps of the run so far."""
        return self.state.completed_steps

    @property
    def is_last_step(self) -> bool:
        """True after the last step, and where the run was asked to end."""
        return self.stop_reason is not None or self.completed_steps >= self.config.max_steps

    def fit(self) -> Path:
        """Trains up to ``max_steps``; saves, validates and logs on the way."""
        assert self.watch is not None
        with self.watch.explaining():
            self._train(self.watch)
            self.watch.close(finished=True)
        config, checkpoint = self.config, self.last_checkpoint
        assert checkpoint is not None
        if self.completed_steps < config.max_steps:
            raise StoppedError(
                f"stopped by {self.stop_reason} after {self.completed_steps} of {config.max_steps} "
                f"steps, saved as {checkpoint}; the same command goes on."
            )
        command = shlex.join(["python", "evaluate.py", "report", "--run", config.log_dir])
        launch.say(f"a page about this run: {command}")
        return checkpoint

    def _train(self, watch: RankWatch) -> None:
        config, self.last_checkpoint = self.config, self.resume_from
        if self.completed_steps >= config.max_steps:
            launch.say(f"nothing to do: {self.resume_from} has {config.max_steps} steps or more")
        self._finish_interrupted_step()
        batches = self.batches()
        while not self.is_last_step:
            step = self.completed_steps
            watch.at(f"before step {step}, where it reads clips")
            started = time.monotonic()
            batch = next(batches)
            waited_seconds = time.monotonic() - started
            watch.at(f"in step {step}")
            row = self.train_step(batch, waited_seconds)
            for callback in self.callbacks:
                watch.at(f"after step {step}, in {type(callback).__name__}")
                callback.after_step(self, row)
        watch.at("at the end, where it waits for the last checkpoint")
        self.finish_save()

    def _finish_interrupted_step(self) -> None:
        """What a run that was killed between saving and logging still owes its last step."""
        before = self.resume_from
        row = {} if before is None else groups.decide(lambda: saved_row(before))
        is_logged = self.log.last_step == row.get("step")
        if not row or groups.decide(lambda: is_logged):
            return
        number = next(i for i, item in enumerate(self.callbacks) if isinstance(item, Save))
        for callback in self.callbacks[number + 1 :]:
            self.tell(f"in {type(callback).__name__}")
            callback.after_step(self, row)

    def tell(self, place: str) -> None:
        """The loop goes on within a callback; all ranks tell the same places in the same order."""
        assert self.watch is not None
        self.watch.at(f"after step {self.completed_steps - 1}, {place}")

    def batches(self) -> Iterator[list[Batch]]:
        """Global batches of this rank, from where the run is, without end; one is made ahead."""
        return prefetched(
            training_batches(
                self.train_data,
                self.layout,
                self.sizes,
                self.state.consumed_samples,
                self.config.data.seed,
                self.config.prompt_dropout,
                self.inputs.order,
            )
        )

    def train_step(self, batches: list[Batch], waited_seconds: float = 0.0) -> dict[str, Any]:
        """One optimizer step on one global batch; returns what metrics.jsonl records of it.

        Where the loss or the gradient is not finite nothing is updated, and the row says so.

        Args:
            batches: of this rank.
            waited_seconds: for them.
        """
        started = time.monotonic()
        self.ddp.train()
        for chunk in chunks_of(self.ddp):
            forget_gradients(chunk)
        self.optimizer.optimizer.zero_grad()
        mean, _ = run_batches(self.ddp, batches)
        return self.update(mean, started, waited_seconds)

    def update(self, mean: Tensor, started: float, waited_seconds: float) -> dict[str, Any]:
        """Applies the gradients of a step, if all is finite; returns what is recorded of it.

        Args:
            mean: the step's loss, a float32 scalar, the same on every rank.
            started: when the step began, by ``time.monotonic``.
            waited_seconds: for its batch, before that.
        """
        rates = self.schedule.rates()
        if self.schedule.body_is_frozen:
            optimizers.drop_body_gradients(self.optimizer.optimizer)
        step = self.completed_steps
        row = {"step": step} | self.meter.fetch(step, mean, waited_seconds)
        norm = row["grad_norm"]
        if math.isfinite(row["reduced_train_loss"]) and math.isfinite(norm):
            optimizers.apply_gradients(self.optimizer.optimizer, norm)
            self._advance()
        row |= rates | self._counts()
        return row | self.meter.speed(time.monotonic() - started, waited_seconds)

    def _advance(self) -> None:
        """A batch is behind the run; the schedule counts it too."""
        self.schedule.step(increment=1)
        consumed = self.state.consumed_samples + self.config.global_batch_size
        self.state = TrainState(self.completed_steps + 1, consumed)

    def _counts(self) -> dict[str, int]:
        return {
            "consumed_samples": self.state.consumed_samples,
            "consumed_tokens": self.state.consumed_samples * self.train_data.seq_length,
            "epoch": self.state.epoch(self.inputs.order.num_samples),
        }

    def skip_batch(self, row: dict[str, Any]) -> list[str]:
        """Goes on behind a batch that made no update; names its clips (on rank 0)."""
        names: list[str] = []
        if launch.is_rank_zero():
            first, size = self.state.consumed_samples, self.config.global_batch_size
            names = clip_names(self.train_data, self.inputs.order, first, size)
        self._advance()
        row |= self._counts()
        return names

    def save(self, row: dict[str, Any]) -> Path:
        """Writes a checkpoint, or begins to; every rank takes part.

        The row gets the seconds that the loop waited for it.

        Raises:
            NonFiniteLossError: a weight is not finite on some rank; nothing is written.
            SaveError: it cannot be written, or the one before could not.
        """
        started = time.monotonic()
        self.finish_save()
        self._check_weights(row)
        state: dict[str, Any] = {
            "completed_steps": self.completed_steps,
            "consumed_samples": self.state.consumed_samples,
        }
        kept = {type(item).__name__: item.state for item in self.callbacks if item.state}
        if kept:
            state["callbacks"] = kept
        epoch = self.state.epoch(self.inputs.order.num_samples)
        name = context.checkpoint_name(epoch, self.completed_steps)
        self.last_checkpoint = self.saver.save(name, state, row)
        row["save_wait_seconds"] = time.monotonic() - started
        self.poll_save()
        return self.last_checkpoint

    def _check_weights(self, row: dict[str, Any]) -> None:
        parameters: list[Tensor] = list(self.model.parameters())
        is_finite = all(bool(torch.isfinite(p).all()) for p in parameters)
        if groups.any_rank(int(not is_finite)):
            raise NonFiniteLossError(
                f"a weight is not finite after step {row['step']}; nothing was saved. Go on from "
                "the last checkpoint with a lower --lr."
            )

    def poll_save(self) -> None:
        """Tells the callbacks of a checkpoint that is complete by now; never waits for one."""
        if self.saver.is_settled():
            self.finish_save()

    def finish_save(self) -> None:
        """Waits for a checkpoint that is being written and tells the callbacks of it."""
        checkpoint = self.saver.wait()
        if checkpoint is not None:
            for callback in self.callbacks:
                callback.after_save(self, checkpoint)

    def record_validation(self, row: dict[str, Any]) -> None:
        """Adds the row's validation to the checkpoint of this step, if one was written."""
        checkpoint = self.last_checkpoint
        if checkpoint is not None and context.completed_steps(checkpoint) == self.completed_steps:
            self.saver.record_validation(checkpoint, row)
