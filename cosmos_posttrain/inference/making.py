"""Items made in batches, shared out among the groups of processes that each hold the model.

Flows in: a session, and items that are left to do. Flows out: their files, and what became of each.
An item that cannot be read costs its batch nothing but a second reading: the others are made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import DatasetError, VideoError
from cosmos_posttrain.inference import outputs
from cosmos_posttrain.inference.config import InferConfig
from cosmos_posttrain.inference.guardrail import Guardrail
from cosmos_posttrain.inference.outputs import Item
from cosmos_posttrain.inference.repeat import command_of
from cosmos_posttrain.inference.request import GeneratedClip
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.inference.truth import beside, true_frames
from cosmos_posttrain.runlog import ProgressDisplay

# What is wrong with one input and no other.
OF_AN_INPUT = (VideoError, DatasetError)


@dataclass(frozen=True)
class Outcome:
    """What became of an item, for the rank that says it.

    Attributes:
        written: what was written; empty on failure.
        failure: why it could not be read.
        note: a sentence about the input.
    """

    written: str = ""
    failure: str = ""
    note: str = ""


@dataclass(frozen=True)
class Pending:
    """An item that is left to do.

    Attributes:
        item: what to make.
        num_given: frames that are given; 0 where they cannot be read.
        num_tokens: to generate.
    """

    item: Item
    num_given: int
    num_tokens: int


def make_batches(session: Session, items: Sequence[Item], size: int) -> list[list[Pending]]:
    """Up to ``size`` items each, of as many given frames, in the order of their first items."""
    open_batches: dict[int, list[Pending]] = {}
    batches: list[list[Pending]] = []
    for item in items:
        job = _pending(session, item)
        batch = open_batches.get(job.num_given)
        if batch is None or len(batch) == size:
            batch = open_batches[job.num_given] = []
            batches.append(batch)
        batch.append(job)
    return batches


def _pending(session: Session, item: Item) -> Pending:
    geometry = session.geometry
    try:
        request = item.request
    except OF_AN_INPUT:
        return Pending(item, 0, 0)
    num_given = request.num_given(geometry)
    num_tokens = request.num_latents(geometry) * geometry.latent_shape.tokens_per_frame
    return Pending(item, num_given, num_tokens - geometry.num_condition_tokens(num_given))


class Maker:
    """Makes the clips of one run.

    Args:
        config: of the run.
        session: that generates.
        guardrail: that blurs faces.
    """

    def __init__(self, config: InferConfig, session: Session, guardrail: Guardrail) -> None:
        self._config, self._session, self._guardrail = config, session, guardrail

    def make(
        self, batches: Sequence[Sequence[Pending]], label: str, is_batch: bool
    ) -> list[Outcome]:
        """Rounds of one batch for each group that shares a model; all learn what became of all.

        A round ends together, so no group ever waits for another longer than for one batch.
        """
        rank, size = groups.data_parallel_place()
        jobs = list(_flat(batches))
        display = ProgressDisplay(sum(job.num_tokens for job in jobs), "tokens", label)
        outcomes: list[Outcome] = []
        done = 0
        for start in range(0, len(batches), size):
            now = batches[start : start + size]
            first, count = now[0][0].item.video.name, len(outcomes) + 1
            where = f"clip {count:,}/{len(jobs):,} ({first})" if is_batch else ""
            progress = partial(_show, display, where, done, now)
            mine = self._generate(now[rank], progress) if rank < len(now) else []
            found = [outcome for some in groups.gather(mine)[: len(now)] for outcome in some]
            for job, outcome in zip(_flat(now), found, strict=True):
                done += 0 if outcome.failure else job.num_tokens
                display.total -= job.num_tokens if outcome.failure else 0
                if outcome.note:
                    display.say(outcome.note)
                if outcome.failure and is_batch:
                    display.say(f"failed: {outcome.failure}")
            outcomes += found
        return outcomes

    def _generate(self, batch: Sequence[Pending], progress: Callable[[int], None]) -> list[Outcome]:
        """Does a batch; its files are written by the first rank of those that share the model."""
        session = self._session
        try:
            requests = [job.item.request for job in batch]
            results = session.generate_many(requests, progress)
        except OF_AN_INPUT as error:
            if len(batch) == 1:
                return [Outcome(failure=named(batch[0].item, error))]
            return [self._generate([job], progress)[0] for job in batch]
        return [self._finish(job, result) for job, result in zip(batch, results, strict=True)]

    def _finish(self, job: Pending, result: GeneratedClip) -> Outcome:
        item, session = job.item, self._session
        if session.is_first:
            try:
                self._write(item, result)
            except OF_AN_INPUT as error:  # the truth beside it
                return Outcome(failure=named(item, error))
        clip, num_given = session.geometry, job.num_given
        note = ""
        if result.num_repeated:
            note = (
                f"note: {item.path} is shorter than {num_given} frames; its last frame was "
                f"repeated {result.num_repeated} times."
            )
        num_frames = result.num_frames(clip.compression)
        return Outcome(
            f"wrote {item.video}: {num_frames} frames of {clip.width}x{clip.height} at "
            f"{result.fps:g} fps, the first {num_given} given; {result.num_generated_tokens} "
            f"tokens in {result.seconds['generate']:.1f} s",
            note=note,
        )

    def _write(self, item: Item, result: GeneratedClip) -> None:
        session, clip = self._session, self._session.geometry
        if self._guardrail.is_active:
            result = dataclasses.replace(result, decode=partial(self._blurred, result.decode))

        def side_by_side() -> Iterator[Tensor]:
            num_frames = result.num_frames(clip.compression)
            truth = true_frames(item, num_frames, clip.height, clip.width, session.decode)
            return beside(result.frame_parts(), self._guardrail.blur_faces(truth))

        def more() -> dict[str, object]:
            size = session.tensor_model_parallel_size
            command = command_of(self._config, item.request, item.video, size)
            return {"command": command, "peak_bytes": dict(session.peaks.num_bytes)}

        outputs.write(item, result, side_by_side, more)
        if self._config.offload_guardrail_models:
            self._guardrail.release()

    def _blurred(
        self, decode: Callable[[Tensor], Iterator[Tensor]], tokens: Tensor
    ) -> Iterator[Tensor]:
        for part in decode(tokens):
            yield self._guardrail.blur_faces(part)


def named(item: Item, error: Exception) -> str:
    """An error, with the input that it is of."""
    text = str(error)
    known = str(item.path if item.path is not None else item.where)
    return text if known in text else f"{item.where or known}: {text}"


def _flat(batches: Sequence[Sequence[Pending]]) -> Iterator[Pending]:
    return (job for batch in batches for job in batch)


def _show(
    display: ProgressDisplay,
    where: str,
    done: int,
    batches: Sequence[Sequence[Pending]],
    count: int,
) -> None:
    """``count`` tokens of each clip are drawn here; the other groups will have as many."""
    display.show(done + sum(min(count, job.num_tokens) for job in _flat(batches)), where)
