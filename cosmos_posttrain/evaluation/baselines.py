"""What can be foreseen without a model: the floors that a loss is read against.

Flows in: ``TrainingCounts`` of the training split. Flows out: baselines that score clips as a model
is scored. With V tokens, u the token at the same place of the previous latent frame:

    uniform          p(v) = 1 / V
    unigram          q(v) = (n(v) + a) / (n + a V)
    previous_frame   p(v|u) = s [v = u] + (1 - s) q(v)
    bigram           p(v|u) = (c(u, v) + k p_previous_frame(v|u)) / (c(u) + k)

The first latent frame has no u, there the last two are the unigram. a, s and k are those under
which each half of the training videos is most likely given the counts of the other half: fitted on
clips of the very videos that were counted, they would trust the counts too much for other videos.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from cosmos_posttrain.evaluation.scoring import NUM_TOP, Scores
from cosmos_posttrain.evaluation.training_counts import TrainingCounts, joined

if TYPE_CHECKING:
    from numpy.typing import NDArray

_AT_ONCE = 1 << 22  # entries of rows that are compared at the same time


class Baseline(Protocol):
    """Scores clips; ``settings`` are the numbers that were fitted."""

    settings: dict[str, float]

    def score(self, clip: NDArray[np.int64], num_frames: int) -> Scores:
        """Scores (T * H * W,) of a clip of so many latent frames."""


class Uniform:
    """All tokens alike."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.settings: dict[str, float] = {}

    def score(self, clip: NDArray[np.int64], num_frames: int) -> Scores:
        """See ``Baseline``."""
        num_others = max(self.vocab_size - NUM_TOP, 0)
        rest = math.log(num_others / self.vocab_size) if num_others else -math.inf
        nll = np.full(clip.shape, math.log(self.vocab_size), np.float32)
        log_rest = np.full(clip.shape, rest, np.float32)
        return Scores(nll, clip.astype(np.int32), log_rest, self.vocab_size)


class Unigram:
    """Each token as often as in training.

    Attributes:
        q: (V,) float64, above 0, adding up to 1.
        order: (V,) tokens by falling probability, the lower number first among equals.
        ranks: (V,) place of each token in ``order``.
    """

    def __init__(self, counts: TrainingCounts, smoothing: float) -> None:
        self.settings = {"smoothing": smoothing}
        weights = counts.tokens + smoothing
        self.q: NDArray[np.float64] = weights / weights.sum()
        self.order = np.argsort(-self.q, kind="stable")
        self.ranks = np.empty(len(self.q), np.int64)
        self.ranks[self.order] = np.arange(len(self.q))
        self._log_rest = _log(float(self.q[self.order[NUM_TOP:]].sum()))

    def score(self, clip: NDArray[np.int64], num_frames: int) -> Scores:
        """See ``Baseline``."""
        nll = -np.log(self.q[clip]).astype(np.float32)
        log_rest = np.full(clip.shape, self._log_rest, np.float32)
        return Scores(nll, self.ranks[clip].astype(np.int32), log_rest, len(self.q))


class SamePlace:
    """The token before at the same place, and what followed it in training.

    Args:
        counts: of the training split.
        unigram: fitted on the same.
        stay: probability of the token before, beyond its share of the unigram.
        strength: k, how many sightings the counts have to outweigh; None for no counts at all.
    """

    def __init__(
        self, counts: TrainingCounts, unigram: Unigram, stay: float, strength: float | None
    ) -> None:
        self.settings = {"stay": stay}
        if strength is not None:
            self.settings["strength"] = strength
        size = self.vocab_size = counts.vocab_size
        self._unigram = unigram
        # Every row has its own token, which stands out of the unigram's order.
        own = np.arange(size, dtype=np.int64) * (size + 1)
        keys = np.concatenate([own, counts.keys if strength is not None else own[:0]])
        weights = np.concatenate([np.zeros(size), counts.pair_counts[: len(keys) - size]])
        self._keys, inverse = np.unique(keys, return_inverse=True)
        weights = np.bincount(inverse, weights, len(self._keys)).astype(np.float64)
        rows = self._keys // size
        self._scale = 1.0 if strength is None else strength
        self._others = self._scale * (1 - stay) * unigram.q  # weights of tokens that have no entry
        self._tokens = (self._keys % size).astype(np.int32)
        self._totals = np.bincount(rows, weights, size) + self._scale
        weights += self._others[self._tokens]
        weights[self._tokens == rows] += self._scale * stay
        self._weights = weights
        self._starts = np.searchsorted(rows, np.arange(size + 1))
        self._log_rests = np.full(size, np.nan)

    def score(self, clip: NDArray[np.int64], num_frames: int) -> Scores:
        """See ``Baseline``."""
        scores = self._unigram.score(clip, num_frames)
        first = len(clip) // num_frames
        before, tokens = clip[:-first], clip[first:]
        if len(tokens):
            weights, is_entry = self._weights_of(before, tokens)
            scores.nll[first:] = np.log(self._totals[before]) - np.log(weights)
            scores.rank[first:] = self._ranks_of(before, tokens, weights, is_entry)
            scores.log_rest[first:] = self._rests_of(before)
        return scores

    def _weights_of(
        self, before: NDArray[np.int64], tokens: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """(n,) weight of each token in its row, and whether the row has an entry for it."""
        keys = before * self.vocab_size + tokens
        entry = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        is_entry = self._keys[entry] == keys
        return np.where(is_entry, self._weights[entry], self._others[tokens]), is_entry

    def _ranks_of(
        self,
        before: NDArray[np.int64],
        tokens: NDArray[np.int64],
        weights: NDArray[np.float64],
        is_entry: NDArray[np.bool_],
    ) -> NDArray[np.int64]:
        """(n,) how many tokens of its row come before each: entries, and others by the unigram."""
        order = self._unigram.order
        places = self._unigram.ranks[tokens].copy()
        falling = -self._others[order]
        entries = np.flatnonzero(is_entry)
        places[entries] = np.searchsorted(falling, -weights[entries])
        ends = np.searchsorted(falling, -weights[entries], side="right")
        for item, end in zip(entries, ends, strict=True):
            if places[item] < end:  # lower numbers that weigh as much come first
                equal = order[places[item] : end]
                places[item] += int(np.searchsorted(equal, tokens[item]))
        ranks = places.copy()
        lengths = np.diff(self._starts)[before]
        for part in _portions(lengths):
            owners = np.repeat(np.arange(part.start, part.stop), lengths[part])
            before_part = np.repeat(np.cumsum(lengths[part]) - lengths[part], lengths[part])
            number = self._starts[before[owners]] + np.arange(len(owners)) - before_part
            weight, token = self._weights[number], self._tokens[number]
            is_before = weight > weights[owners]
            is_before |= (weight == weights[owners]) & (token < tokens[owners])
            # Tokens that have an entry are in the unigram's order too, and were counted there.
            is_counted = self._unigram.ranks[token] < places[owners]
            change = is_before.astype(np.float64) - is_counted
            ranks[part] += np.bincount(owners - part.start, change).astype(np.int64)
        return ranks

    def _rests_of(self, before: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n,) log of the probability outside the ``NUM_TOP`` most likely tokens of each row."""
        for row in np.unique(before[np.isnan(self._log_rests[before])]):
            self._log_rests[row] = self._log_rest(int(row))
        return self._log_rests[before]

    def _log_rest(self, row: int) -> float:
        num_others = self.vocab_size - NUM_TOP
        if num_others <= 0:
            return -math.inf
        part = slice(self._starts[row], self._starts[row + 1])
        candidates = self._unigram.order[: NUM_TOP + part.stop - part.start]
        candidates = candidates[~np.isin(candidates, self._tokens[part])]
        weights = np.concatenate([self._weights[part], self._others[candidates]])
        top = np.partition(weights, len(weights) - NUM_TOP)[len(weights) - NUM_TOP :]
        total = float(self._totals[row])
        # What rounding could make 0 is at least so much.
        least = num_others * float(self._others[self._unigram.order[-1]])
        return _log(max(total - float(top.sum()), least) / total)


def _portions(lengths: NDArray[np.int64]) -> list[slice]:
    """Neighbours whose lengths add up to ``_AT_ONCE`` or less, at least one at a time."""
    portions, first, total = [], 0, 0
    for number, length in enumerate(lengths.tolist()):
        if total + length > _AT_ONCE and number > first:
            portions.append(slice(first, number))
            first, total = number, 0
        total += length
    return [*portions, slice(first, len(lengths))]


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


# Fitting.


def fit(first: TrainingCounts, second: TrainingCounts) -> dict[str, Baseline]:
    """All baselines by name, fitted between two halves and made of both."""
    smoothing = fit_smoothing(first.tokens, second.tokens)
    pairs = [
        (second, first, Unigram(first, smoothing).q),
        (first, second, Unigram(second, smoothing).q),
    ]
    stay = fit_stay([(scored, q) for scored, _, q in pairs])
    strength = fit_strength(pairs, stay)
    counts = joined(first, second)
    unigram = Unigram(counts, smoothing)
    return {
        "uniform": Uniform(counts.vocab_size),
        "unigram": unigram,
        "previous_frame": SamePlace(counts, unigram, stay, None),
        "bigram": SamePlace(counts, unigram, stay, strength),
    }


def fit_smoothing(first: NDArray[np.int64], second: NDArray[np.int64]) -> float:
    """A of the unigram, from the counts (V,) of each half."""

    def likelihood(smoothing: float) -> float:
        total = 0.0
        for scored, counted in ((first, second), (second, first)):
            logs = np.log(counted + smoothing) - math.log(counted.sum() + smoothing * len(counted))
            total += float((scored * logs).sum())
        return total

    return _best(likelihood, 1e-6, 1e6)


def fit_stay(halves: list[tuple[TrainingCounts, NDArray[np.float64]]]) -> float:
    """S of the previous frame: where the derivative of the likelihood is 0.

    Args:
        halves: counts of a half, and q of the other one.
    """
    num_pairs = sum(counts.num_pairs for counts, _ in halves)
    num_kept = sum(int(counts.kept.sum()) for counts, _ in halves)

    def slope(stay: float) -> float:
        kept = sum(
            float((counts.kept * (1 - q) / (stay + (1 - stay) * q)).sum()) for counts, q in halves
        )
        return kept - (num_pairs - num_kept) / (1 - stay)

    low, high = 0.0, 1 - 1 / (num_pairs + 2)  # a change stays possible
    if slope(low) <= 0:
        return low
    if slope(high) >= 0:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return (low + high) / 2


def fit_strength(
    halves: list[tuple[TrainingCounts, TrainingCounts, NDArray[np.float64]]], stay: float
) -> float | None:
    """K of the bigram; None where no latent frame comes after another.

    Args:
        halves: counts of a half, counts of the other one, and q of the other one.
        stay: s of the previous frame.
    """
    parts = []
    for scored, counted, q in halves:
        rows, tokens = np.divmod(scored.keys, scored.vocab_size)
        prior = (1 - stay) * q[tokens] + stay * (rows == tokens)
        totals = np.bincount(
            counted.keys // counted.vocab_size, counted.pair_counts, counted.vocab_size
        )
        parts.append((scored.pair_counts, _look_up(counted, scored.keys), totals[rows], prior))

    def likelihood(strength: float) -> float:
        return sum(
            float((times * np.log((known + strength * prior) / (total + strength))).sum())
            for times, known, total, prior in parts
        )

    if not any(len(scored.keys) for scored, *_ in halves):
        return None
    return _best(likelihood, 1e-3, 1e6)


def _look_up(counts: TrainingCounts, keys: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often pairs occur; 0 for those that do not."""
    if not len(counts.keys):
        return np.zeros(len(keys))
    places = np.minimum(np.searchsorted(counts.keys, keys), len(counts.keys) - 1)
    found: NDArray[np.float64] = np.where(
        counts.keys[places] == keys, counts.pair_counts[places], 0.0
    )
    return found


def _best(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one positive number is largest: a grid of its logarithm, then refined."""
    left, right = math.log(low), math.log(high)
    for num_points in (25, 9, 9, 9, 9):
        points = np.linspace(left, right, num_points)
        best = int(np.argmax([function(math.exp(point)) for point in points]))
        left, right = points[max(best - 1, 0)], points[min(best + 1, num_points - 1)]
    return math.exp(float(points[best]))
