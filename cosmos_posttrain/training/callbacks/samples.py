"""Sample clips at fixed steps, as films in the run folder, TensorBoard and W&B."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron.core.distributed import DistributedDataParallel

from cosmos_posttrain import launch
from cosmos_posttrain.data.batch import SequenceLayout
from cosmos_posttrain.errors import UserError
from cosmos_posttrain.training.callbacks.base import Callback, Row, Run
from cosmos_posttrain.training.callbacks.log import Log
from cosmos_posttrain.training.films import FilmMaker
from cosmos_posttrain.training.sample_clips import ContinuedClip, SampleMaker, num_given_latents
from cosmos_posttrain.training.watching_config import SamplesConfig
from cosmos_posttrain.video import write_mp4

if TYPE_CHECKING:
    from cosmos_posttrain.training.setup import Inputs

FOLDER = "samples"


class Samples(Callback):
    """Makes samples every ``every_n_steps`` steps and after the last one.

    Args:
        every_n_steps: optimizer steps.
        maker: continues clips, on all ranks.
        films: makes them films, on rank 0.
        log: of the run.
    """

    def __init__(self, every_n_steps: int, maker: SampleMaker, films: FilmMaker, log: Log) -> None:
        self._every, self._maker, self._films, self._log = every_n_steps, maker, films, log

    def after_step(self, run: Run, row: Row) -> None:
        is_due = run.completed_steps % self._every == 0 or run.is_last_step
        if not is_due or run.stop_reason is not None:  # who asks a run to end does not wait long
            return
        try:
            clips = self._maker.make(run.tell)
        except UserError as error:  # on every rank
            launch.say(f"warning: no samples of step {row['step']}: {error}", error=True)
            return
        if not launch.is_rank_zero():
            return
        try:
            self._write(clips, row["step"])
        except (UserError, OSError, RuntimeError, ValueError) as error:  # no film is worth a run
            launch.say(f"warning: no samples of step {row['step']}: {error}", error=True)

    def _write(self, clips: list[ContinuedClip], step: int) -> None:
        for film in self._films.films(clips):
            path = self._log.folder / FOLDER / f"step={step}" / f"clip={film.number}.mp4"
            write_mp4(path, film.frames, film.fps)
            gif, size = film.picture()
            self._log.write_video(f"samples/clip={film.number}", path, gif, size, step)


def make_samples(
    config: SamplesConfig,
    inputs: Inputs,
    ddp: DistributedDataParallel,
    layout: SequenceLayout,
    log: Log,
) -> Samples | None:
    """The callback of a run that was asked for samples, which ``check_samples`` let pass."""
    if config.every_n_steps is None:
        return None
    data = inputs.val_data or inputs.train_data
    num_latents = data.latent_shape.time
    given = num_given_latents(layout.num_given // data.latent_shape.tokens_per_frame, num_latents)
    films = FilmMaker(config, data)
    maker = SampleMaker(ddp, data, layout, config.num_clips, given)
    launch.say(
        f"samples every {config.every_n_steps} steps: {min(config.num_clips, len(data))} clips of "
        f"the {data.split} split, {num_latents - given} of {num_latents} latent frames generated, "
        f"decoded by {films.tokenizer_path}"
    )
    return Samples(config.every_n_steps, maker, films, log)
