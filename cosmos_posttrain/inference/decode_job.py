"""One batch to be decoded, by any of the ways.

Flows in: a model, the given tokens of some clips and how the others are drawn. Flows out: those.

    modules      Megatron's own modules, one token after another
    passes       a decode plan, one token or a window of drafts after another
    graphs       the same as static steps, recorded on a GPU and replayed
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from torch import Tensor

from cosmos_posttrain.inference.cuda_graph import CudaGraphs, say_refused
from cosmos_posttrain.inference.decode_plan import DecodePlan
from cosmos_posttrain.inference.decode_state import DecodeState
from cosmos_posttrain.inference.decoding import (
    Decoded,
    NextScores,
    decode_in_windows,
    decode_one_by_one,
)
from cosmos_posttrain.inference.drafts import Drafts
from cosmos_posttrain.inference.head_drafts import HeadCounts, HeadDrafts
from cosmos_posttrain.inference.module_scores import GuidedScores, ModuleScores
from cosmos_posttrain.inference.sampling import Draw
from cosmos_posttrain.inference.static_step import BLOCK, Runner, StaticPasses, StaticState
from cosmos_posttrain.inference.windows import LARGEST_WINDOW
from cosmos_posttrain.models.ar_model import ARModel


class _Refused(Exception):
    """A static step cannot run on some rank; the same on all ranks.

    Attributes:
        reason: in the words of the first of them.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextlib.contextmanager
def _all_or_none() -> Iterator[None]:
    """What fails inside on one tensor-parallel rank has failed on all, so that none goes on alone.

    Raises:
        _Refused: on all of them.
    """
    reason = None
    try:
        yield
    except RuntimeError as error:
        reason = str(error)
    for told in _gather(reason):
        if told is not None:
            raise _Refused(told)


def _gather(value: str | None) -> list[str | None]:
    """Every tensor-parallel rank's text."""
    values = [value] * parallel_state.get_tensor_model_parallel_world_size()
    if len(values) > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.all_gather_object(values, value, group=group)
    return values


@dataclass(frozen=True)
class DecodeJob:
    """What is to be decoded, and how its tokens are drawn; see ``generate``."""

    model: ARModel
    prompt: Tensor
    num_tokens: int
    draw: Draw
    contexts: Tensor | None
    guidance_scale: float
    progress: Callable[[int], None] | None
    observe: Callable[[Decoded], None] | None

    def by_passes(
        self, decoding: str, window: int | None, head_counts: HeadCounts | None = None
    ) -> Tensor:
        """``sequential``, ``jacobi`` or ``modules``; of Medusa heads see ``generate``."""
        length = self.prompt.shape[1] + self.num_tokens
        told, draw = (self.progress, self.observe), _agreed_draw(self.draw)
        if decoding != "jacobi":
            scores = self._open_scores(decoding, length)
            return decode_one_by_one(scores, self.prompt, self.num_tokens, draw, *told)
        scores = self._open_scores(decoding, length + (window or LARGEST_WINDOW))
        frame = self.model.latent_shape.tokens_per_frame
        heads = None
        if count := self.model.config.num_medusa_heads:
            assert isinstance(scores, DecodeState | GuidedScores)
            heads = HeadDrafts(scores.head_scores, draw, count, head_counts)
        return decode_in_windows(
            scores, self.prompt, self.num_tokens, draw, window, frame, *told, heads=heads
        )

    def by_graphs(self, decoding: str, window: int | None) -> Tensor | None:
        """``sequential`` or ``jacobi`` by recorded steps; see ``by_static_steps``."""
        return self.by_static_steps(1 if decoding == "sequential" else window, CudaGraphs)

    def by_static_steps(
        self,
        window: int | None,
        open_runner: Callable[[Runner], Runner] | None,
        block: int = BLOCK,
    ) -> Tensor | None:
        """Steps of fixed shapes; None where this device cannot run one, and one sentence says so.

        Args:
            window: 1 is one token after another; see ``decode_in_windows``.
            open_runner: see ``StaticPasses``.
            block: see ``StaticState``.
        """
        length = self.prompt.shape[1]
        room = length + self.num_tokens + (window or LARGEST_WINDOW)
        prompt_state = self._open_state(length)
        draw = _agreed_draw(dataclasses.replace(self.draw, can_wait=False))

        def open_passes(drafts: Drafts) -> StaticPasses:
            with _all_or_none():
                state = StaticState(prompt_state, room, block)
                passes = StaticPasses(state, draw, drafts, self.guidance_scale, open_runner)
            with _all_or_none():
                passes.begin()
            return passes

        try:
            return decode_in_windows(
                self._guided(prompt_state),
                self.prompt,
                self.num_tokens,
                draw,
                window,
                self.model.latent_shape.tokens_per_frame,
                self.progress,
                self.observe,
                open_passes,
            )
        except _Refused as refused:
            say_refused(refused.reason)
            return None

    def _open_scores(self, decoding: str, max_length: int) -> NextScores:
        """The model with an empty cache."""
        if decoding == "modules":
            return self._guided(ModuleScores(self.model, self._num_rows, max_length, self.contexts))
        return self._guided(self._open_state(max_length))

    def _open_state(self, max_length: int) -> DecodeState:
        return DecodeState(DecodePlan(self.model), self._num_rows, max_length, self.contexts)

    def _guided(self, scores: NextScores) -> NextScores:
        return scores if self.guidance_scale == 1 else GuidedScores(scores, self.guidance_scale)

    @property
    def _num_rows(self) -> int:
        return len(self.prompt) * (1 if self.guidance_scale == 1 else 2)


def _agreed_draw(draw: Draw) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, positions: _agreed(draw(scores, positions))


def _agreed(tokens: Tensor) -> Tensor:
    """The first tensor-parallel rank's tokens on all of them.

    Ranks compute the same draws from the same gathered scores, but on GPUs of different kinds a
    logarithm may round differently, and two ranks that go on from different tokens decode noise or
    wait for each other forever. A few bytes beside the layers' own sums.
    """
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        tokens = tokens.contiguous()
        torch.distributed.broadcast(
            tokens,
            parallel_state.get_tensor_model_parallel_src_rank(),
            parallel_state.get_tensor_model_parallel_group(),
        )
    return tokens
