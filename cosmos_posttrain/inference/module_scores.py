"""Scores from Megatron's own modules, and scores of two texts as one.

The modules are slow, a Python call each, and what the decode plan is compared with.
"""

from __future__ import annotations

from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor

from cosmos_posttrain.inference.decode_state import DecodeState
from cosmos_posttrain.inference.decoding import NextScores
from cosmos_posttrain.inference.sampling import guide
from cosmos_posttrain.models.ar_model import ARModel


class ModuleScores:
    """An ``ARModel`` with Megatron's cache; see ``NextScores``. Scores the last token only.

    Args:
        model: the model.
        batch_size: clips.
        max_length: tokens that the cache holds.
        context: (B, L, context_dim) of a Video2World model.
    """

    def __init__(
        self, model: ARModel, batch_size: int, max_length: int, context: Tensor | None = None
    ) -> None:
        self._model, self._context = model, context
        self._cache = StaticInferenceContext(batch_size, max_length)
        self.length = 0

    def feed(self, tokens: Tensor, num_scores: int = 1, starts: list[int] | None = None) -> Tensor:
        """See ``NextScores``; for one token after another only."""
        assert num_scores == 1 and starts is None and self.length == self._cache.sequence_len_offset
        scores = self._model.next_token_logits(tokens, self._cache, self._context)
        self._context = None  # its keys are in the cache
        self.length += tokens.shape[1]
        return scores[:, None]


class GuidedScores:
    """Scores of B clips out of 2 B rows: with their text, and with another; see ``guide``.

    Args:
        scores: of the rows.
        guidance_scale: see ``guide``.
    """

    def __init__(self, scores: NextScores, guidance_scale: float) -> None:
        self._scores, self._guidance_scale = scores, guidance_scale

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._scores.length

    @length.setter
    def length(self, value: int) -> None:
        self._scores.length = value

    def feed(self, tokens: Tensor, num_scores: int = 1, starts: list[int] | None = None) -> Tensor:
        """Feeds both rows of each clip the same; see ``NextScores``."""
        twice = None if starts is None else starts * 2
        found = self._scores.feed(tokens.repeat(2, 1), num_scores, twice)
        return guide(found, self._guidance_scale)

    def head_scores(self, rows: Tensor) -> Tensor:
        """As ``DecodeState.head_scores``, of a model that has heads."""
        assert isinstance(self._scores, DecodeState)
        return guide(self._scores.head_scores(rows.repeat(2)), self._guidance_scale)
