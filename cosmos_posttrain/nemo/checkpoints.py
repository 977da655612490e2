"""Checkpoints as NeMo writes them, that the direct engine goes on from.

Flows in: a step of the run. Flows out: ``epoch=E-step=S/weights`` by NeMo, with the optimizer in
Megatron's fully reshardable form, and ``context`` with NeMo's files and ours. While it is written a
mark of NeMo's lies beside it, which the direct engine knows.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.dist import file_error
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import SaveError
from cosmos_posttrain.nemo.bases import ModelCheckpoint
from cosmos_posttrain.training.run_folder import Record
from cosmos_posttrain.training.saving import Saver


class CosmosCheckpoint(ModelCheckpoint):
    """NeMo's callback, which saves when it is told to.

    Args:
        folder: where checkpoints go.
        every_n_steps: for NeMo's records.

    Attributes:
        write_context: called on rank 0 with a checkpoint before it counts as complete.
        on_preemption: called where the run is to end.
    """

    write_context: Callable[[Path], None]
    on_preemption: Callable[[], None]

    def __init__(self, folder: Path, every_n_steps: int) -> None:
        super().__init__(
            dirpath=str(folder),
            filename="{epoch}-{step}",
            monitor=None,
            save_top_k=-1,
            save_last=False,
            every_n_train_steps=every_n_steps,
            save_optim_on_train_end=True,
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """NeMo's, which would move the run's files to a folder of their own."""
        from nemo.utils import AppState

        AppState().files_to_move = []
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """Saving is an item of the run's list of callbacks."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Likewise."""

    def save(self, trainer: Any, checkpoint: Path) -> None:
        """Writes a checkpoint; every rank takes part."""
        self._save_checkpoint(trainer, f"{checkpoint}.ckpt")

    def _save_last_checkpoint(self, trainer: Any, candidates: Any) -> None:
        """Called by ``PreemptionCallback``."""
        self.on_preemption()

    def _get_finalize_save_checkpoint_callback(
        self, trainer: Any, filepath: str, global_step: int
    ) -> Callable[[], None]:
        complete = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)

        def write_and_complete() -> None:
            groups.decide(lambda: self.write_context(Path(filepath.removesuffix(".ckpt"))))
            complete()

        return write_and_complete


class NemoSaver(Saver):
    """Writes the checkpoints of a run by NeMo.

    Args:
        *parts: as ``Saver``'s.
        trainer: NeMo's.
    """

    def __init__(self, *parts: Any, trainer: Any) -> None:
        super().__init__(*parts)
        self._trainer = trainer

    def save(self, name: str, state: dict[str, Any], row: dict[str, Any]) -> Path:
        """Writes a checkpoint; see ``Saver``."""
        config, folder = self._config, self._folder
        groups.decide(lambda: folder.check_room(self.num_bytes))
        record = Record(self._model.model_config, copy.deepcopy(state), dict(row))
        target = self._pending = folder.checkpoints / name
        callback = self._trainer.checkpoint_callback
        failed = "make room, then give the same command again."

        def write_context(checkpoint: Path) -> None:
            try:
                folder.write_context(config, checkpoint, record)
            except OSError as error:
                raise SaveError(f"{target} cannot be written ({error}); {failed}") from error

        callback.write_context = write_context
        try:
            callback.save(self._trainer, target)
        except Exception as error:
            self._remove_half_of_it()
            said = None if isinstance(error, SaveError) else file_error(error)
            if said is None:
                raise
            raise SaveError(f"{target} cannot be written ({said}); {failed}") from error
        if launch.is_rank_zero():
            folder.prune(config)
        return target

    def _remove_half_of_it(self) -> None:
        """By one rank alone: others may be lost."""
        if launch.is_rank_zero():
            with contextlib.suppress(OSError):
                context.remove_unfinished(self._folder.checkpoints)
