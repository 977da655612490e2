"""A run of ``evaluate.py generate``: continues the clips of a split and scores them.

Flows in: a ``GenerateEvalConfig``. Flows out, in the output folder: ``metrics.json``, and for each
clip ``clips/NAME/{truth,reconstruction,generated}.mp4`` (``generated_seed1.mp4`` and so on with
several samples).

    tokens --first latent frames--> Session.generate_many --samples--> scores.score --row--> figures

Groups of processes that share a model share out the clips, a batch each in every round.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain import files, launch
from cosmos_posttrain.checkpoint.dist import quiet_megatron_logging
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import ConfigError, DatasetError, PartialFailureError, VideoError
from cosmos_posttrain.evaluation.config.generate import GenerateEvalConfig, validate
from cosmos_posttrain.evaluation.environment import environment
from cosmos_posttrain.evaluation.generation import guesses
from cosmos_posttrain.evaluation.generation.inputs import ClipInputs, GenerateInputs
from cosmos_posttrain.evaluation.generation.scores import (
    GENERATED,
    RECONSTRUCTION,
    Case,
    mean_of,
    score,
)
from cosmos_posttrain.evaluation.generation.summary import figures_of
from cosmos_posttrain.evaluation.lpips import LPIPS, MIN_SIZE, load_lpips
from cosmos_posttrain.evaluation.result_folder import ResultFolder, check_foreign, result
from cosmos_posttrain.inference.request import GeneratedClip
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.video import check_writing, write_mp4

CLIPS_FOLDER = "clips"
_PRODUCTS = (CLIPS_FOLDER,)


def run(config: GenerateEvalConfig) -> dict[str, Any]:
    """Evaluates a model, or continues an evaluation, or finds it complete; all ranks together.

    Returns:
        What ``metrics.json`` holds; nothing on other ranks than 0.

    Raises:
        UserError: bad settings or input; nothing was written.
        PartialFailureError: more than ``max_failures`` clips could not be read; the others are
            scored and written.
    """
    validate(config)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.sampson and not guesses.has_opencv():
        raise ConfigError(
            "--sampson needs OpenCV, which is not installed; pip install "
            "'cosmos_posttrain[evaluation]', or leave it out."
        )
    quiet_megatron_logging()
    inputs = GenerateInputs(config)
    lpips = _load_lpips(config, inputs)
    groups.initialize(groups.Parallelism(tensor=inputs.session.tensor_model_parallel_size))
    folder, metrics = _folder(config, inputs), None
    with contextlib.ExitStack() as held:

        def start() -> tuple[bool, int]:
            nonlocal metrics
            files.check_writable(config.output)
            held.enter_context(files.locked(config.output))
            check_foreign(config.output, _PRODUCTS, config.overwrite)
            check_writing()
            metrics = folder.start(config.overwrite)
            return metrics is not None, len(folder.rows)

        is_complete, num_done = groups.decide(start)
        if is_complete:
            launch.say(f"{config.output} is complete already; nothing to do.")
        else:
            _announce(config, inputs, num_done)
            _score_all(config, inputs, lpips, folder, num_done)
            if launch.is_rank_zero():
                metrics = _finish(config, inputs, folder)
        return _report(metrics, config) if metrics is not None else {}


def _load_lpips(config: GenerateEvalConfig, inputs: GenerateInputs) -> LPIPS | None:
    if config.lpips_weights is None:
        return None
    clip = inputs.session.geometry
    if min(clip.height, clip.width) < MIN_SIZE:
        raise ConfigError(
            f"LPIPS needs frames of {MIN_SIZE}x{MIN_SIZE} pixels, the data set's have "
            f"{clip.width}x{clip.height}; leave --lpips_weights out."
        )
    return load_lpips(Path(config.lpips_weights), launch.device())


def _folder(config: GenerateEvalConfig, inputs: GenerateInputs) -> ResultFolder:
    weights = config.lpips_weights and sorted(Path(config.lpips_weights).glob("*.pth"))
    settings = inputs.settings() | {
        "has_constant_motion": guesses.has_opencv(),
        "lpips_sha256": [files.sha256_of_file(path) for path in weights] if weights else None,
    }
    return ResultFolder(config.output, settings, _PRODUCTS)


def _announce(config: GenerateEvalConfig, inputs: GenerateInputs, num_done: int) -> None:
    clip, count = inputs.session.geometry, len(inputs.numbers)
    launch.say(
        f"{count} of {len(inputs.clips)} clips of the {config.split} split, {clip.num_frames} "
        f"frames of {clip.width}x{clip.height}, {inputs.num_given} given; scored against the "
        f"{inputs.truth}"
    )
    notes = list(inputs.notes)
    if config.videos is None:
        notes.append(
            "name the source videos' folder with --videos to score against them: the tokenizer's "
            "own losses are not counted now"
        )
    if not guesses.has_opencv():
        notes.append("the floor of constant motion needs OpenCV: pip install '.[evaluation]'")
    elif inputs.num_given < 2:
        notes.append("the floor of constant motion needs two given frames")
    if config.lpips_weights is None:
        notes.append("LPIPS needs --lpips_weights")
    for note in notes:
        launch.say(f"note: {note}.", error=True)
    if num_done:
        launch.say(f"continuing {config.output}: {num_done} clips are done.")


def _score_all(
    config: GenerateEvalConfig,
    inputs: GenerateInputs,
    lpips: LPIPS | None,
    folder: ResultFolder,
    num_done: int,
) -> None:
    """Adds a row for every clip that has none yet, in order; the folder is rank 0's."""
    rank, num_ranks = groups.data_parallel_place()
    inputs.session.load()
    progress, num_failed = ProgressDisplay(len(inputs.numbers), "clips", done=num_done), 0
    # Clips whose samples fill a batch.
    size = max(1, config.batch_size // config.num_samples)
    for first in range(num_done, len(inputs.numbers), num_ranks * size):
        now = inputs.numbers[first : first + num_ranks * size]
        mine = _rows(config, inputs, lpips, now[rank * size : (rank + 1) * size])
        for row in itertools.chain.from_iterable(groups.gather(mine)):
            if "error" in row:
                num_failed += 1
                progress.say(f"not read: {row['error']}")
            if launch.is_rank_zero():
                folder.append(row)
            progress.advance(f"{num_failed} failed" if num_failed else "")


def _rows(
    config: GenerateEvalConfig, inputs: GenerateInputs, lpips: LPIPS | None, numbers: Sequence[int]
) -> list[dict[str, Any]]:
    """Continues and scores some clips; all ranks that share the model together."""
    read: dict[int, ClipInputs | str] = {}
    for number in numbers:
        try:
            read[number] = inputs.read(number)
        except (DatasetError, VideoError) as error:
            read[number] = str(error)
    requests = [
        inputs.request(clip, number, sample)
        for number, clip in read.items()
        if not isinstance(clip, str)
        for sample in range(config.num_samples)
    ]
    made: list[GeneratedClip] = []
    for start in range(0, len(requests), config.batch_size):
        made += inputs.session.generate_many(requests[start : start + config.batch_size])
    rows = []
    for number, clip in read.items():
        if isinstance(clip, str):
            rows.append({"name": f"{number:05d}", "clip": number, "error": clip})
        else:
            own, made = made[: config.num_samples], made[config.num_samples :]
            rows.append(_row(config, inputs, lpips, number, clip, own))
    return rows


def _row(
    config: GenerateEvalConfig,
    inputs: GenerateInputs,
    lpips: LPIPS | None,
    number: int,
    clip: ClipInputs,
    made: Sequence[GeneratedClip],
) -> dict[str, Any]:
    """Scores one clip's samples."""
    about = {
        "name": clip.name,
        "clip": number,
        "video": clip.row.source,
        "first_frame": clip.row.first_frame,
        "num_repeated": clip.row.num_repeated,
    }
    if not inputs.session.is_first:  # nobody asks for its row
        return about
    case = _case(inputs, clip)
    samples = [item.frames for item in made]
    _write_clips(config.output / CLIPS_FOLDER / clip.name, clip, case, samples)
    rates = [item.num_generated_tokens / item.seconds["generate"] for item in made]
    return {
        **about,
        **score(case, samples, lpips, config.sampson),
        "tokens_per_second": round(sum(rates) / len(rates), 2),
        **_of_heads(made),
    }


def _of_heads(made: Sequence[GeneratedClip]) -> dict[str, Any]:
    """What the model's Medusa heads foretold of a clip's samples; nothing where none was asked."""
    found = [item.draft_heads for item in made if item.draft_heads is not None]
    return {"medusa_heads": functools.reduce(operator.add, found).to_json()} if found else {}


def _case(inputs: GenerateInputs, clip: ClipInputs) -> Case:
    reconstruction = inputs.session.decode(clip.tokens)
    truth = reconstruction if clip.frames is None else clip.frames
    return Case(truth, reconstruction, inputs.num_given, clip.world)


def _write_clips(folder: Path, clip: ClipInputs, case: Case, samples: Sequence[Tensor]) -> None:
    films = {"truth": case.truth}
    if case.has_ceiling:
        films[RECONSTRUCTION] = case.reconstruction
    for number, sample in enumerate(samples):
        films[f"{GENERATED}_seed{number}" if len(samples) > 1 else GENERATED] = sample
    for name, frames in films.items():
        write_mp4(folder / f"{name}.mp4", frames, clip.fps)


def _finish(
    config: GenerateEvalConfig, inputs: GenerateInputs, folder: ResultFolder
) -> dict[str, Any]:
    rows = [row for row in folder.rows if "error" not in row]
    failures = [row for row in folder.rows if "error" in row]
    if not rows:
        raise PartialFailureError(f"none of the clips could be read: {failures[0]['error']}")
    figures = figures_of(rows, inputs.num_given, config.num_samples)
    rates = [row["tokens_per_second"] for row in rows]
    figures |= {"num_failures": len(failures), "tokens_per_second": mean_of(rates)}
    used = environment(launch.device(), config.dtype)
    used |= {"tensor_model_parallel_size": inputs.session.tensor_model_parallel_size}
    metrics = result("generate", folder.settings, figures, rows, failures, used, folder.seconds)
    folder.finish(metrics)
    return metrics


def _report(metrics: dict[str, Any], config: GenerateEvalConfig) -> dict[str, Any]:
    """Says what came out, and raises if too many clips failed."""
    figures, failures = metrics["figures"], metrics["failures"]
    order = (GENERATED, guesses.REPEAT, guesses.MOTION, RECONSTRUCTION)
    found = [what for what in order if what in figures]
    parts = [f"{what.replace('_', ' ')} {figures[what]['psnr']:.2f} dB" for what in found]
    low, high = figures["failure_rate_interval"]
    launch.say(
        f"{figures['num_clips']} clips: PSNR {', '.join(parts)}; failure rate "
        f"{figures['failure_rate']:.1%} ({low:.1%} to {high:.1%}): {config.output}"
    )
    if len(failures) > config.max_failures:
        raise PartialFailureError(
            f"{len(failures)} of {len(failures) + len(metrics['rows'])} clips could not be read, "
            f"and max_failures is {config.max_failures}; the others are scored in {config.output}, "
            "and metrics.json there names each with its reason."
        )
    return metrics
