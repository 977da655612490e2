"""The three figures, one window after another: tokens in, scores of what was predicted out.

    next_8_frames                   window of T latent frames: T - 1 given, the last predicted with
                                    every token before each given
    next_17_frames_teacher_forced   two windows: the first given, the second predicted, likewise
    next_17_frames_rollout          the same, but after the first window the model reads its own
                                    most likely tokens; each is still scored on the truth

Flows in: a model and tokens (B, n). Flows out: ``Scores`` (B, n), rank -1 where nothing is
predicted; of a rollout also the most likely tokens at every place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cosmos_posttrain.checkpoint.load import load_source
from cosmos_posttrain.checkpoint.source import CheckpointSource
from cosmos_posttrain.data.batch import SequenceLayout
from cosmos_posttrain.evaluation.config.onex import NEXT_8_FRAMES, ROLLOUT, OnexEvalConfig
from cosmos_posttrain.evaluation.scoring import Scorer, Scores, of_clips
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.inference.decoding import Decoded
from cosmos_posttrain.inference.engine import generate
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.token_scores import NUM_TOP, TokenScores, score_logits
from cosmos_posttrain.training.scores import gather_clips

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Part:
    """One figure: which tokens are given, and how the others are predicted.

    Attributes:
        name: its key in ``metrics.json``.
        shape: the grid of one item, one or two windows.
        num_given: first tokens that are given.
        num_windows: of an item.
        is_rollout: the model reads its own tokens.
    """

    name: str
    shape: LatentShape
    num_given: int
    num_windows: int
    is_rollout: bool

    @classmethod
    def of(cls, name: str, window: LatentShape) -> Part:
        """The part of a name, for windows of a shape."""
        if name == NEXT_8_FRAMES:
            return cls(name, window, window.num_tokens - window.tokens_per_frame, 1, False)
        pair = LatentShape(2 * window.time, window.height, window.width)
        return cls(name, pair, window.num_tokens, 2, name == ROLLOUT)

    @property
    def num_predicted(self) -> int:
        """Tokens of an item that are predicted."""
        return self.shape.num_tokens - self.num_given


@dataclass(frozen=True)
class MostLikely:
    """The most likely tokens at every predicted place.

    Attributes:
        tokens: (B, num_predicted, NUM_TOP) int32, most likely first.
        log_probs: likewise, float16: of the whole vocabulary.
    """

    tokens: NDArray[np.int32]
    log_probs: NDArray[np.float16]


class PartModel:
    """A model at the grid of one part; the ranks that share it call the same methods.

    Args:
        source: the checkpoint.
        config: the settings.
        tensor_model_parallel_size: processes that share the model.
    """

    def __init__(
        self, source: CheckpointSource, config: OnexEvalConfig, tensor_model_parallel_size: int
    ) -> None:
        self._source, self._config = source, config
        self._tensor_size = tensor_model_parallel_size
        self._model: ARModel | None = None

    def at(self, shape: LatentShape) -> ARModel:
        """The model at a grid; the one at another grid is let go first."""
        if self._model is None or self._model.latent_shape != shape:
            self._model = None
            config = self._config
            at_grid = self._source.at_grid(shape, config.rope_scaling, config.rope_scale)
            self._model = load_source(at_grid, config.dtype, self._tensor_size, config.layer_spec)
        return self._model

    def measure(
        self, part: Part, tokens: NDArray[np.int64], with_most_likely: bool = False
    ) -> tuple[Scores, MostLikely | None]:
        """Scores items of all data-parallel ranks.

        Args:
            part: which figure.
            tokens: (B, n) of this rank's items; where n is fewer than the grid's, the rest is not
                known and what is scored there means nothing.
            with_most_likely: also give the most likely tokens (of a rollout).

        Returns:
            Of all ranks' items one below the other, on every rank: scores (DP * B, T * H * W) and
            the most likely tokens.
        """
        model = self.at(part.shape)
        scorer = Scorer(model.module)
        clips = np.zeros((len(tokens), part.shape.num_tokens), np.int64)
        clips[:, : tokens.shape[1]] = tokens
        if not part.is_rollout:
            layout = SequenceLayout(part.shape.num_tokens, num_given=part.num_given)
            batch = layout.batch(torch.from_numpy(clips), torch.ones(len(clips)))
            return scorer.gather(of_clips(scorer.score(batch), layout, clips.shape[1])), None
        scores, most_likely = _roll_out(model, part, torch.from_numpy(clips), with_most_likely)
        scores = scorer.gather(scores)
        if most_likely is not None:
            gathered = gather_clips(most_likely.tokens), gather_clips(most_likely.log_probs)
            most_likely = MostLikely(*gathered)
        return scores, most_likely


def _roll_out(
    model: ARModel, part: Part, clips: Tensor, with_most_likely: bool
) -> tuple[Scores, MostLikely | None]:
    given, truth = clips[:, : part.num_given], clips[:, part.num_given :].to(model.device)
    # All stays on the device until the end, so that nothing waits between tokens.
    scored: list[TokenScores] = []
    likely: list[tuple[Tensor, Tensor]] = []

    def observe(found: Decoded) -> None:
        logits = found.scores[:, 0].float()
        scored.append(score_logits(logits, truth[:, found.first]))
        if with_most_likely:
            log_probs = torch.log_softmax(logits, -1)
            top = log_probs.topk(min(NUM_TOP, logits.shape[-1]), -1)
            likely.append((top.indices.to(torch.int32), top.values.to(torch.float16)))

    # One after another: of every place, the scores of all clips at once.
    generate(
        model,
        given,
        part.num_predicted,
        temperature=0.0,
        decoding="sequential",
        observe=observe,
    )
    shape = (len(clips), part.num_given)

    def whole(name: str, of_given: float) -> NDArray[Any]:
        found = torch.stack([getattr(column, name) for column in scored], dim=1).cpu().numpy()
        return np.concatenate([np.full(shape, of_given, found.dtype), found], axis=1)

    scores = Scores(
        whole("nll", np.nan), whole("rank", -1), whole("log_rest", np.nan), model.config.vocab_size
    )
    if not with_most_likely:
        return scores, None
    tokens, log_probs = (
        torch.stack(column, dim=1).cpu().numpy() for column in zip(*likely, strict=True)
    )
    return scores, MostLikely(tokens, log_probs)


def batches(
    items: Sequence[int], batch_size: int, rank: int, num_ranks: int
) -> Iterator[tuple[list[int], list[int]]]:
    """All ranks' next items and this rank's own, as many for each; the last is repeated to fill."""
    step = batch_size * num_ranks
    for first in range(0, len(items), step):
        everyone = list(items[first : first + step])
        size = min(batch_size, -(-len(everyone) // num_ranks))
        filled = everyone + everyone[-1:] * (size * num_ranks - len(everyone))
        yield everyone, filled[rank * size : (rank + 1) * size]
