"""A run of ``infer.py``: its inputs, batch after batch, to files.

Flows in: an ``InferConfig``. Flows out: for each input an mp4 and a json. Groups of processes that
share a model share out the inputs, a batch each in every round. The first rank decides what is left
to do, and holds the outputs against a second run. An input that cannot be read is a failure, the
others are done; the same command does what is left.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from cosmos_posttrain import files, launch
from cosmos_posttrain.checkpoint.dist import quiet_megatron_logging
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import (
    ConfigError,
    DatasetError,
    PartialFailureError,
    TextError,
    UserError,
)
from cosmos_posttrain.inference import outputs
from cosmos_posttrain.inference.config import InferConfig, validate
from cosmos_posttrain.inference.contract import check_input_type, check_tokens
from cosmos_posttrain.inference.guardrail import Guardrail
from cosmos_posttrain.inference.inputs import make_items
from cosmos_posttrain.inference.making import Maker, Outcome, Pending, make_batches, named
from cosmos_posttrain.inference.outputs import Item
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.inference.token_inputs import open_tokens
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.video import check_writing

# So few are encoded before anybody asks how long it takes.
_MAX_SILENT_PROMPTS = 8
# Failures that the last sentence repeats; each is said when it happens.
_MAX_REPEATED = 10


def open_run(config: InferConfig) -> tuple[Session, list[Item]]:
    """Everything that can be checked before weights are loaded; writes nothing.

    Raises:
        UserError: one of its children, for anything that does not fit.
    """
    validate(config)
    if config.num_gpus is not None:
        config = dataclasses.replace(config, tensor_model_parallel_size=config.num_gpus)
    tokens = None
    if config.input_tokens_dir is not None:
        tokens = open_tokens(config.input_tokens_dir)
        config = tokens.settings(config)
    items = make_items(config, tokens)
    session = Session(config)
    geometry = session.geometry
    if geometry.height % 2 or geometry.width % 2:
        raise ConfigError(
            f"an mp4 needs an even width and height, not {geometry.width}x{geometry.height}."
        )
    if tokens is not None:
        check_tokens(tokens.tokenizer, session.tokenizer_info, config.allow_tokenizer_mismatch)
    check_input_type(config.input_type, session.model_config, session.name)
    for item in items[:1] if tokens is not None else items:
        _check(session, item)
    return session, items


def _check(session: Session, item: Item) -> None:
    try:
        session.check(item.request)
    except DatasetError:
        return  # a failure of this item
    except UserError as error:
        if not item.where or not isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{item.where}: {error}") from error


@contextlib.contextmanager
def _claimed(session: Session, items: Sequence[Item], overwrite: bool) -> Iterator[list[Item]]:
    """What is left to do, the same on every rank, while the first rank holds its files.

    Raises:
        OutputFolderError: another run is writing one of them, or something else is there.
    """

    def left(numbers: Iterable[int]) -> list[int]:
        return [i for i in numbers if overwrite or not _is_complete(session, items[i])]

    def claim() -> list[int]:
        numbers = left(range(len(items)))
        if numbers:
            folder = items[0].video.parent
            names = {items[i].video.name for i in numbers}
            held.enter_context(files.locked(folder, only=names))
            written = {path.name for i in numbers for path in items[i].files}
            files.remove_leftovers(folder, written)
            numbers = left(numbers)  # another run may have ended in between
        return numbers

    with contextlib.ExitStack() as held:
        yield [items[i] for i in groups.decide(claim)]


def _is_complete(session: Session, item: Item) -> bool:
    try:
        settings = session.settings_of(item.request)
    except DatasetError:
        return False
    return outputs.is_complete(item, settings)


def _allowed(
    config: InferConfig, guardrail: Guardrail, items: Sequence[Item]
) -> tuple[list[Item], list[Outcome]]:
    """The items whose prompts may be asked for, and what became of the others; on all ranks."""
    if not guardrail.is_active:
        return list(items), []

    def check() -> dict[str, str]:
        blocked = {}
        for prompt in dict.fromkeys(text for item in items for text in _prompts(item)[:1]):
            try:
                guardrail.check_prompt(prompt)
            except TextError as error:
                blocked[prompt] = str(error)
        if config.offload_guardrail_models:
            guardrail.release()
        return blocked

    blocked = groups.decide(check)
    allowed, outcomes = [], []
    for item in items:
        reason = next((blocked[text] for text in _prompts(item)[:1] if text in blocked), None)
        if reason is None:
            allowed.append(item)
        else:
            outcomes.append(Outcome(failure=named(item, TextError(reason))))
    return allowed, outcomes


def _prompts(item: Item) -> list[str]:
    """The texts of an item, its prompt first."""
    try:
        return item.request.prompts
    except DatasetError:
        return []


def _encode_prompts(session: Session, batches: Sequence[Sequence[Pending]]) -> None:
    """Encodes the texts of all items, each in the group that will generate it."""
    if not session.model_config.is_video2world:
        return
    rank, size = groups.data_parallel_place()
    mine, all_texts = (
        list(dict.fromkeys(text for batch in some for job in batch for text in _prompts(job.item)))
        for some in (batches[rank::size], batches)
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
    guardrail = Guardrail(config.guardrail_dir, config.disable_guardrail)
    session, items = open_run(config)
    for note in (*_notes(config), *guardrail.notes, *session.notes):
        launch.say(f"note: {note}.", error=True)
    groups.initialize(groups.Parallelism(tensor=session.tensor_model_parallel_size))
    is_batch = config.input_image_or_video_path is None or len(items) > 1
    with _claimed(session, items, config.overwrite) as left:
        if len(left) < len(items):
            num_complete = len(items) - len(left)
            launch.say(f"note: {num_complete} output(s) are complete already; skipped.", error=True)
        if not left:
            return
        check_writing()
        allowed, outcomes = _allowed(config, guardrail, left)
        batches = make_batches(session, allowed, config.batch_size)
        if batches:
            _encode_prompts(session, batches)
            session.load()
            label = "batch" if is_batch else allowed[0].video.name
            outcomes += Maker(config, session, guardrail).make(batches, label, is_batch)
    if session.peaks.text:
        launch.say(session.peaks.text, error=True)
    _report(config, outcomes, is_batch)


def _notes(config: InferConfig) -> tuple[str, ...]:
    if config.disable_diffusion_decoder:
        return ()
    return (
        "the diffusion decoder is not part of this package, the discrete tokenizer decodes "
        "(--disable_diffusion_decoder says so and silences this)",
    )


def _report(config: InferConfig, outcomes: Sequence[Outcome], is_batch: bool) -> None:
    written = [outcome.written for outcome in outcomes if outcome.written]
    failures = [outcome.failure for outcome in outcomes if outcome.failure]
    if not is_batch:
        if failures:
            raise UserError(failures[0])
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
