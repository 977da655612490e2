"""Per-token scores of a model on clips, as numpy: what every teacher-forced figure is made of.

Flows in: a model opened on any layout, and batches (B, S). Flows out: ``Scores``: loss, rank and
the mass beyond the 500 most likely tokens of every position; then all is arithmetic.

    Batch --Scorer.score--> Scores (B, S) of this data-parallel rank --Scorer.gather--> of all ranks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.data.batch import Batch, SequenceLayout
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.models.token_scores import NUM_TOP, TokenScores
from cosmos_posttrain.training.scores import gather_clips, score_batch

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Scores:
    """How well tokens were foreseen; arrays of one shape.

    Attributes:
        nll: float32, cross-entropy in nats.
        rank: int32, how many tokens are more likely (0: it is what a greedy decoder takes).
        log_rest: float32, log of the probability outside the 500 most likely; -inf where the
            vocabulary has no more.
        vocab_size: tokens that can be predicted.
    """

    nll: NDArray[np.float32]
    rank: NDArray[np.int32]
    log_rest: NDArray[np.float32]
    vocab_size: int

    def is_among(self, num: int) -> NDArray[np.bool_]:
        """Whether the token is one of the ``num`` most likely."""
        return self.rank < num

    def top_cross_entropy(self) -> NDArray[np.float64]:
        """Nats where only the 500 most likely tokens keep their probability.

        What they leave is shared evenly by all other tokens. With at most 500 tokens in all, this
        is the cross-entropy.
        """
        num_others = max(self.vocab_size - NUM_TOP, 1)
        outside = np.log(num_others) - self.log_rest.astype(np.float64)
        return np.where(self.is_among(NUM_TOP), self.nll.astype(np.float64), outside)

    def at(self, index: Any) -> Scores:
        """A part of the arrays, as numpy indexes them."""
        return Scores(self.nll[index], self.rank[index], self.log_rest[index], self.vocab_size)


def _to_numpy(scores: TokenScores, vocab_size: int) -> Scores:
    nll, rank, log_rest = (x.cpu().numpy() for x in (scores.nll, scores.rank, scores.log_rest))
    return Scores(nll, rank, log_rest, vocab_size)


class Scorer:
    """A model that scores batches; the ranks that share it call the same methods.

    Args:
        module: this rank's part of the model.
    """

    def __init__(self, module: CosmosGPTModel) -> None:
        self.module = module.eval()
        self.vocab_size = module.model_config.vocab_size

    def score(self, batch: Batch) -> Scores:
        """Scores (B, S) of the labels, which are those of this data-parallel rank.

        Position i is scored on ``batch.labels[:, i]``, the token after it; where
        ``batch.loss_mask`` is 0 the scores mean nothing.
        """
        return _to_numpy(score_batch(self.module, batch), self.vocab_size)

    def gather(self, scores: Scores) -> Scores:
        """The data-parallel ranks' scores one below the other, on every rank: (DP * B, S)."""
        arrays = (scores.nll, scores.rank, scores.log_rest)
        nll, rank, log_rest = (gather_clips(array) for array in arrays)
        return Scores(nll, rank, log_rest, self.vocab_size)


def of_clips(scores: Scores, layout: SequenceLayout, num_tokens: int) -> Scores:
    """Scores by the clip's tokens instead of by the sequence's positions.

    Args:
        scores: (B, S).
        layout: of the sequences.
        num_tokens: of a clip, T * H * W.

    Returns:
        (B, T * H * W): item i is of token i; NaN and rank -1 where it is not predicted (the first
        of a clip with nothing before it, and given latent frames).
    """
    first = len(layout.prefix)
    start = max(layout.num_given, 1 - first)
    shape = (scores.nll.shape[0], num_tokens)
    nll, log_rest = (np.full(shape, np.nan, np.float32) for _ in range(2))
    rank = np.full(shape, -1, np.int32)
    positions = slice(start + first - 1, num_tokens + first - 1)
    nll[:, start:] = scores.nll[:, positions]
    rank[:, start:] = scores.rank[:, positions]
    log_rest[:, start:] = scores.log_rest[:, positions]
    return Scores(nll, rank, log_rest, scores.vocab_size)
