"""A run of ``infer.py``: its inputs, one after another, to files.

Flows in: an ``InferConfig``. Flows out: for each input an mp4 and a json. Groups of processes that
share a model share out the inputs, one each in every round. The first rank decides what is left to
do, and holds the outputs against a second run. An input that cannot be read is a failure, the
others are done; the same command does what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core import parallel_state

from cosmos_posttrain import files, launch
from cosmos_posttrain.checkpoint.dist import quiet_megatron_logging
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import ConfigError, PartialFailureError, VideoError
from cosmos_posttrain.inference import outputs
from cosmos_posttrain.inference.config import InferConfig, validate
from cosmos_posttrain.inference.contract import check_input_type
from cosmos_posttrain.inference.outputs import BatchLine, Item
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.video import is_image, probe

# So few are encoded before anybody asks how long it takes.
_MAX_SILENT_PROMPTS = 8
# Failures that the last sentence repeats; each is said when it happens.
_MAX_REPEATED = 10


@dataclass(frozen=True)
class _Outcome:
    """What became of an item, for the rank that says it.

    Attributes:
        written: what was written; empty on failure.
        failure: why it could not be read.
        note: a sentence about the input.
    """

    written: str = ""
    failure: str = ""
    note: str = ""


def make_items(config: InferConfig) -> list[Item]:
    """The clips that a config asks for, in order; writes nothing.

    Raises:
        ConfigError: inputs that do not exist, do not fit ``--input_type``, or would be overwritten.
        VideoError: a single input that cannot be decoded.
        OutputFolderError: the folder of the outputs cannot be written to.
    """
    folder = Path(config.video_save_folder)
    if config.batch_input_path is not None:
        lines = outputs.read_batch(config.batch_input_path)
        if config.is_plain:
            lines = [dataclasses.replace(line, prompt=None) for line in lines]
        videos = [folder / f"{name}.mp4" for name in outputs.output_names(lines)]
    else:
        assert config.input_image_or_video_path is not None
        lines = [BatchLine(Path(config.input_image_or_video_path), config.prompt)]
        videos = [outputs.single_output(config.video_save_name, config.video_save_folder)]
        probe(lines[0].path)
    for line in lines if config.input_type in ("video", "text_and_video") else ():
        if is_image(line.path):
            wanted = str(config.input_type).replace("video", "image")
            raise ConfigError(f"{line.path} is an image; give --input_type {wanted}.")
    items = [
        Item(_request(config, line), video, line.where)
        for line, video in zip(lines, videos, strict=True)
    ]
    outputs.check_inputs_survive(items)
    files.check_writable(videos[0].parent)
    return items


def _request(config: InferConfig, line: BatchLine) -> Request:
    return Request(
        path=line.path,
        prompt=line.prompt,
        negative_prompt=config.negative_prompt,
        guidance_scale=config.guidance_scale,
        num_input_frames=1 if config.takes_images else config.num_input_frames,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=config.seed,
        fps=config.fps,
    )


def open_run(config: InferConfig) -> tuple[Session, list[Item]]:
    """Everything that can be checked before weights are loaded; writes nothing.

    Raises:
        UserError: one of its children, for anything that does not fit.
    """
    validate(config)
    items = make_items(config)
    session = Session(config)
    geometry = session.geometry
    if geometry.height % 2 or geometry.width % 2:
        raise ConfigError(
            f"an mp4 needs an even width and height, not {geometry.width}x{geometry.height}."
        )
    check_input_type(config.input_type, session.model_config, session.name)
    for item in items:
        try:
            session.check(item.request)
        except ConfigError as error:
            if not item.where:
                raise
            raise ConfigError(f"{item.where}: {error}") from error
    return session, items


@contextlib.contextmanager
def _claimed(session: Session, items: Sequence[Item], overwrite: bool) -> Iterator[list[Item]]:
    """What is left to do, the same on every rank, while the first rank holds its files.

    Raises:
        OutputFolderError: another run is writing one of them, or something else is there.
    """

    def left(numbers: Iterable[int]) -> list[int]:
        if overwrite:
            return list(numbers)
        pairs = ((i, session.settings_of(items[i].request)) for i in numbers)
        return [i for i, settings in pairs if not outputs.is_complete(items[i], settings)]

    def claim() -> list[int]:
        numbers = left(range(len(items)))
        if numbers:
            folder = items[0].video.parent
            names = {items[i].video.name for i in numbers}
            held.enter_context(files.locked(folder, only=names))
            files.remove_leftovers(folder, names | {items[i].record.name for i in numbers})
            numbers = left(numbers)  # another run may have ended in between
        return numbers

    with contextlib.ExitStack() as held:
        yield [items[i] for i in groups.decide(claim)]


def _generate(session: Session, item: Item, progress: Callable[[int], None]) -> _Outcome:
    """Does one item; its files are written by the first rank of those that share the model."""
    try:
        result = session.generate(item.request, progress)
    except VideoError as error:
        return _Outcome(failure=str(error))
    if session.is_first:
        outputs.write(item, result)
    clip, num_given = session.geometry, result.settings["num_input_frames"]
    note = ""
    if result.num_repeated:
        note = (
            f"note: {item.request.path} is shorter than {num_given} frames; its last frame was "
            f"repeated {result.num_repeated} times."
        )
    return _Outcome(
        f"wrote {item.video}: {clip.num_frames} frames of {clip.width}x{clip.height} at "
        f"{result.fps:g} fps, the first {num_given} given; {result.num_generated_tokens} tokens "
        f"in {result.seconds['generate']:.1f} s",
        note=note,
    )


def _gathered(outcome: _Outcome | None) -> list[_Outcome]:
    """The outcomes of a round, from every group that shares a model."""
    size = parallel_state.get_data_parallel_world_size()
    outcomes: list[_Outcome | None] = [outcome] * size
    if size > 1:
        group = parallel_state.get_data_parallel_group()
        torch.distributed.all_gather_object(outcomes, outcome, group=group)
    return [outcome for outcome in outcomes if outcome is not None]


def _run_items(session: Session, items: Sequence[Item], is_batch: bool) -> list[_Outcome]:
    """Rounds of one item for each group that shares a model; all groups learn what became of all.

    A round ends together, so no group ever waits for another longer than for one clip.
    """
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    num_tokens = [_num_tokens(session, item) for item in items]
    label = "batch" if is_batch else items[0].video.name
    display = ProgressDisplay(sum(num_tokens), "tokens", label)
    outcomes: list[_Outcome] = []
    done = 0
    for start in range(0, len(items), size):
        now = items[start : start + size]
        where = f"clip {start + 1:,}/{len(items):,} ({now[0].video.name})" if is_batch else ""
        numbers = num_tokens[start : start + size]
        progress = partial(_show, display, where, done, numbers)
        mine = _generate(session, now[rank], progress) if rank < len(now) else None
        found = _gathered(mine)
        for number, outcome in zip(numbers, found, strict=True):
            done += 0 if outcome.failure else number
            display.total -= number if outcome.failure else 0
            if outcome.note:
                display.say(outcome.note)
            if outcome.failure and is_batch:
                display.say(f"failed: {outcome.failure}")
        outcomes += found
    return outcomes


def _num_tokens(session: Session, item: Item) -> int:
    """Tokens to generate for an item."""
    clip = session.geometry
    return clip.seq_length - clip.num_condition_tokens(item.request.num_given(clip))


def _show(
    display: ProgressDisplay, where: str, done: int, numbers: Sequence[int], count: int
) -> None:
    """``count`` tokens of the round are drawn here; the other groups will have as many."""
    display.show(done + sum(min(count, number) for number in numbers), where)


def _encode_prompts(session: Session, items: Sequence[Item]) -> None:
    """Encodes the texts of all items, each in the group that will generate it."""
    rank = parallel_state.get_data_parallel_rank()
    size = parallel_state.get_data_parallel_world_size()
    mine, all_texts = (
        list(dict.fromkeys(text for item in some for text in item.request.prompts))
        for some in (items[rank::size], items)
    )
    show = None
    if len(mine) > _MAX_SILENT_PROMPTS:
        show = ProgressDisplay(len(mine), "prompts", "text").show
    session.encode_prompts(mine, all_texts, show)


def run(config: InferConfig) -> None:
    """Carries out one run of ``infer.py``.

    Raises:
        UserError: bad usage or bad input, or outputs that cannot be written.
        PartialFailureError: some inputs of a batch could not be read; the others are done.
    """
    quiet_megatron_logging()
    session, items = open_run(config)
    for note in (*_notes(config), *session.notes):
        launch.say(f"note: {note}.", error=True)
    groups.initialize(groups.Parallelism(tensor=session.tensor_model_parallel_size))
    with _claimed(session, items, config.overwrite) as left:
        if len(left) < len(items):
            num_complete = len(items) - len(left)
            launch.say(f"note: {num_complete} output(s) are complete already; skipped.", error=True)
        if not left:
            return
        _encode_prompts(session, left)
        session.load()
        outcomes = _run_items(session, left, config.batch_input_path is not None)
    _report(config, outcomes)


def _notes(config: InferConfig) -> tuple[str, ...]:
    if config.disable_diffusion_decoder:
        return ()
    return (
        "the diffusion decoder is not part of this package, the discrete tokenizer decodes "
        "(--disable_diffusion_decoder says so and silences this)",
    )


def _report(config: InferConfig, outcomes: Sequence[_Outcome]) -> None:
    written = [outcome.written for outcome in outcomes if outcome.written]
    failures = [outcome.failure for outcome in outcomes if outcome.failure]
    if config.batch_input_path is None:
        if failures:
            raise VideoError(failures[0])
        launch.say(written[0])
        return
    launch.say(f"wrote {len(written)} clip(s) to {config.video_save_folder}")
    if failures:
        more = len(failures) - _MAX_REPEATED
        raise PartialFailureError(
            f"{len(failures)} of {len(outcomes)} inputs could not be read, the others are done: "
            + " ".join(failures[:_MAX_REPEATED])
            + (f" And {more} more, each named above." if more > 0 else "")
        )
