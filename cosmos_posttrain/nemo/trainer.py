"""The direct engine's run with NeMo's loop, model wrappers, strategy and checkpoints.

Flows in: a ``TrainConfig``. Flows out: the run folder that the direct engine writes too. NeMo's
trainer drives; where a step's gradients are ready it calls the direct engine's update, and after
each step the run's list of callbacks is walked as there.

    llm.api.train -> model is built, wrapped -> optimizer is asked for: all that surrounds it is set
    up, and a checkpoint to go on from is read -> steps
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint import context, damage, nemo_context
from cosmos_posttrain.checkpoint.formats.megatron import WEIGHTS
from cosmos_posttrain.distributed.watch import RankWatch
from cosmos_posttrain.models.gpt_model import CosmosGPTModel
from cosmos_posttrain.nemo import lightning_parts
from cosmos_posttrain.nemo.bases import Callback
from cosmos_posttrain.nemo.boards import CosmosLogger, NemoLog
from cosmos_posttrain.nemo.checkpoints import CosmosCheckpoint, NemoSaver
from cosmos_posttrain.nemo.config import CosmosConfig
from cosmos_posttrain.nemo.data import CosmosData
from cosmos_posttrain.nemo.device import nemo_device
from cosmos_posttrain.nemo.model import CosmosModel
from cosmos_posttrain.nemo.optimizer import CosmosStep, optimizer_module
from cosmos_posttrain.training import building
from cosmos_posttrain.training import optimizer as optimizers
from cosmos_posttrain.training.callbacks.log import Log
from cosmos_posttrain.training.gradients import fuse_weight_gradients
from cosmos_posttrain.training.saving import Saver
from cosmos_posttrain.training.trainer import Trainer


class _Bare(nn.Module):
    """The model without NeMo's wrappers, in the form of one that has them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class _Hooks(Callback):
    """Lightning's calls, handed on to the run."""

    def __init__(self, run: NemoTrainer) -> None:
        self._run = run

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._run.begin()

    def on_train_batch_start(self, *_: Any) -> None:
        self._run.before_step()

    def on_train_batch_end(self, *_: Any) -> None:
        self._run.after_step()


class NemoTrainer(Trainer):
    """A run whose loop is NeMo's.

    Attributes:
        row: of the last step.
    """

    def _build(self) -> None:
        """Nothing yet: NeMo builds the model, and asks for its optimizer in the middle of that."""
        self.row: dict[str, Any] = {}

    def _train(self, watch: RankWatch) -> None:
        config, folder = self.config, self.folder
        self.last_checkpoint = self.resume_from
        with nemo_device(), lightning_parts.quiet():
            module = self._make_module()
            data = CosmosData(self.batches, self.sizes, self.layout.seq_length)
            module.optim.make = lambda model: self._make_optimizer(model, data)
            self._lightning = lightning_parts.make_trainer(config, self.dtype, _Hooks(self))
            checkpoints = CosmosCheckpoint(folder.checkpoints, config.save_every_n_steps)
            checkpoints.on_preemption = self._stop
            self._nemo_logger = CosmosLogger(
                explicit_log_dir=str(folder.log_dir),  # the only folder that is there by now
                use_datetime_version=False,
                update_logger_directory=False,
                ckpt=checkpoints,
            )
            parts = {"model": module, "data": data, "trainer": self._lightning}
            parts |= {"log": self._nemo_logger, "resume": self._auto_resume()}
            try:
                lightning_parts.run(**parts)
            except SystemExit:  # how PreemptionCallback ends a run
                if self.stop_reason is None:
                    raise
        watch.at("at the end")
        self.finish_save()

    def _make_module(self) -> CosmosModel:
        config, model = self.config, self.config.model
        settings = CosmosConfig.of(
            self.inputs.model_config,
            self.dtype,
            sequence_parallel=config.parallel.sequence_parallel,
            deterministic_mode=config.deterministic_mode,
            calculate_per_token_loss=True,
            gradient_accumulation_fusion=torch.cuda.is_available() and fuse_weight_gradients(),
            layer_spec=model.layer_spec,
            init_seed=model.seed,
            z_loss_coefficient=config.z_loss_coefficient,
            **building.recompute_settings(model),
        )
        return CosmosModel(settings, optimizer_module(config, self.dtype))

    def _make_optimizer(self, model: Any, data: CosmosData) -> CosmosStep:
        """NeMo has built and wrapped the model; all that surrounds it follows."""
        module: CosmosGPTModel = model[0].bare_module
        module.model_config = self.inputs.model_config  # whose weights may be of another dtype
        self.model = module
        self.ddp = _Bare(self.model)  # for what only looks at the model
        optimizer = optimizers.build_optimizer(self.config, model[0].module, self.dtype)
        self.optimizer = optimizers.CheckpointableOptimizer(optimizer)
        self._surround()

        def update(mean: Tensor, started: float, waited_seconds: float) -> dict[str, Any]:
            self.row = self.update(mean, started, waited_seconds)
            return self.row

        return CosmosStep(optimizer, update, lambda: data.waited_seconds)

    def _make_saver(self) -> Saver:
        parts = (self.config, self.folder, self.model, self.optimizer)
        return NemoSaver(*parts, trainer=self._lightning)

    def _make_log(self) -> Log:
        self._nemo_logger.begin(self.folder.run)
        return NemoLog(self.config, self.folder.run, self.completed_steps, self._lightning)

    def _nemo_reads(self) -> bool:
        """Whether NeMo reads the weights to start from: a checkpoint with a context of NeMo's.

        One that its engine wrote, or convert_checkpoint.py for NeMo, taken as it is. NeMo would
        execute what a folder ``modelopt_state`` holds.
        """
        path = self.inputs.source.path
        if self.resume_from is not None or self.inputs.transfer is not None or path is None:
            return False
        if not (context.is_checkpoint(path) and nemo_context.has_context(path)):
            return False
        has_more = (path / WEIGHTS / "modelopt_state").exists()
        return context.read_model_config(path).lora is None and not has_more

    def _auto_resume(self) -> Any:
        """How NeMo is to begin: with a checkpoint that it reads, or with what ``_load`` reads."""
        import nemo.lightning as nl

        if not self._nemo_reads():
            return None
        path = self.inputs.source.path
        assert path is not None
        damage.check_weights(path / WEIGHTS)
        self.inputs.source.open_weights()  # names all that does not fit
        return nl.AutoResume(restore_config=nl.RestoreConfig(path=str(path), load_artifacts=False))

    def _load(self) -> dict[str, Any]:
        """As the direct engine's: Megatron's own way reads no state of torch's AdamW."""
        if self._lightning.strategy.restore_config is None:
            return super()._load()
        lightning_parts.restore(self._lightning.strategy)
        self.optimizer.take_weights()
        return {}

    def begin(self) -> None:
        """All is set up, and no step has begun."""
        self.last_checkpoint = self.resume_from  # an older one where the newest was damaged
        done = self.completed_steps
        if done >= self.config.max_steps:
            launch.say(f"nothing to do: {self.resume_from} has {done} steps")
        self._finish_interrupted_step()
        # Lightning's own counts.
        loop = self._lightning.fit_loop.epoch_loop
        loop.automatic_optimization.optim_progress.optimizer.step.total.completed = done
        loop._batches_that_stepped = done

    def before_step(self) -> None:
        """Tells where the run is."""
        assert self.watch is not None
        self.watch.at(f"in step {self.completed_steps}")

    def after_step(self) -> None:
        """Walks the run's callbacks."""
        for callback in self.callbacks:
            self.tell(f"in {type(callback).__name__}")
            callback.after_step(self, self.row)
        if self.stop_reason is not None:
            self._lightning.should_stop = True

    def _stop(self) -> None:
        """Saves where PreemptionCallback has heard of the end."""
        self.stop_reason = "SIGTERM"
        last = self.last_checkpoint
        if last is None or context.completed_steps(last) != self.completed_steps:
            self.save(self.row)
