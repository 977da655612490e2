"""The floors of a loss: against closed forms, and against distributions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cosmos_posttrain.evaluation import baselines, scoring
from cosmos_posttrain.evaluation.baselines import SamePlace, Uniform, Unigram
from cosmos_posttrain.evaluation.training_counts import TrainingCounts, count

FRAMES, PLACES = 3, 5


def counts_of(clips: np.ndarray, vocab_size: int, max_pairs: int = 10**6) -> TrainingCounts:
    return count(list(clips), vocab_size, FRAMES, max_pairs)


def random_clips(num_clips: int, vocab_size: int, seed: int, stay: float = 0.5) -> np.ndarray:
    """Clips whose tokens stay with a probability, and else are drawn from a steep distribution."""
    generator = np.random.default_rng(seed)
    p = 1 / np.arange(1, vocab_size + 1)
    clips = generator.choice(vocab_size, (num_clips, FRAMES, PLACES), p=p / p.sum())
    for frame in range(1, FRAMES):
        stays = generator.random((num_clips, PLACES)) < stay
        clips[:, frame] = np.where(stays, clips[:, frame - 1], clips[:, frame])
    return clips.reshape(num_clips, -1)


def test_uniform_is_the_logarithm_of_the_vocabulary() -> None:
    scores = Uniform(1000).score(np.array([0, 7, 999]), 1)
    np.testing.assert_allclose(scores.nll, math.log(1000), rtol=1e-6)
    np.testing.assert_allclose(scores.top_cross_entropy(), math.log(1000), rtol=1e-6)
    assert scores.rank.tolist() == [0, 7, 999]


def test_unigram_is_the_smoothed_frequency() -> None:
    counts = counts_of(np.array([[0] * 9 + [1] * 5 + [2]]), 4)
    scores = Unigram(counts, smoothing=0.5).score(np.array([0, 1, 2, 3]), 1)
    np.testing.assert_allclose(np.exp(-scores.nll), np.array([9.5, 5.5, 1.5, 0.5]) / 17, rtol=1e-6)
    assert scores.rank.tolist() == [0, 1, 2, 3]


def test_smoothing_is_best_for_what_is_left_out() -> None:
    values = np.array([9, 5, 1, 0, 0, 1])
    found = baselines.fit_smoothing(values)

    def left_out(a: float) -> float:
        return sum(n * math.log((n - 1 + a) / (16 - 1 + 6 * a)) for n in values if n)

    assert left_out(found) >= max(left_out(a) for a in np.geomspace(1e-3, 1e3, 2000)) - 1e-6


def test_stay_has_a_closed_form_under_a_uniform_background() -> None:
    """s + (1 - s) / V is the share of tokens that stay."""
    counts = counts_of(random_clips(200, 20, 0), 20)
    share = counts.kept.sum() / counts.num_pairs
    found = baselines.fit_stay(counts, np.full(20, 1 / 20))
    assert found + (1 - found) / 20 == pytest.approx(share, abs=1e-9)


def test_stay_at_its_ends() -> None:
    still = counts_of(np.zeros((2, 15), np.int64), 3)
    assert 1 - 1e-1 < baselines.fit_stay(still, np.full(3, 1 / 3)) < 1
    flipping = counts_of(np.array([[0] * 5 + [1] * 5 + [0] * 5]), 2)
    assert baselines.fit_stay(flipping, np.full(2, 1 / 2)) == 0
    image = count([np.arange(5)], 5, 1, 100)
    assert set(baselines.fit(image)) == {"uniform", "unigram", "previous_frame", "bigram"}


def written_out(
    counts: TrainingCounts, q: np.ndarray, stay: float, strength: float | None
) -> np.ndarray:
    """(V, V) the distribution after each token, by its definition."""
    size = counts.vocab_size
    prior = stay * np.eye(size) + (1 - stay) * q
    if strength is None:
        return prior
    table = np.zeros((size, size))
    table[counts.keys // size, counts.keys % size] = counts.pair_counts
    return (table + strength * prior) / (table.sum(axis=1, keepdims=True) + strength)


@pytest.mark.parametrize("strength", [None, 0.3, 40.0])
@pytest.mark.parametrize("stay", [0.0, 0.4, 0.999])
def test_same_place_scores_are_those_of_the_table(
    stay: float, strength: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "NUM_TOP", 6)
    monkeypatch.setattr(scoring, "NUM_TOP", 6)
    monkeypatch.setattr(baselines, "_AT_ONCE", 50)
    size = 30
    counts = counts_of(random_clips(40, size, 1), size)
    unigram = Unigram(counts)
    assert len(np.unique(unigram.q)) < size  # equally likely tokens, whose order is their number
    baseline = SamePlace(counts, unigram, stay, strength)
    table = written_out(counts, unigram.q, stay, strength)
    np.testing.assert_allclose(table.sum(axis=1), 1)
    clips = random_clips(60, size, 2)
    for clip in clips:
        scores = baseline.score(clip, FRAMES)
        p = table[clip[:-PLACES]]
        target = clip[PLACES:]
        own = p[np.arange(len(target)), target]
        np.testing.assert_allclose(scores.nll[PLACES:], -np.log(own), rtol=1e-5)
        np.testing.assert_allclose(scores.nll[:PLACES], -np.log(unigram.q[clip[:PLACES]]), 1e-5)
        # Sums round differently from the table's; what is closer than that counts as equal.
        rounded = np.array([[float(f"{x:.9e}") for x in row] for row in p])
        mine = rounded[np.arange(len(target)), target][:, None]
        is_before = (rounded > mine) | ((rounded == mine) & (np.arange(size) < target[:, None]))
        assert scores.rank[PLACES:].tolist() == is_before.sum(axis=1).tolist()
        rest = np.sort(p, axis=1)[:, : size - 6].sum(axis=1)
        np.testing.assert_allclose(np.exp(scores.log_rest[PLACES:]), rest, rtol=1e-5)


def test_bigram_learns_what_follows_what() -> None:
    """Each token is followed by the next number: neither the unigram nor the last frame knows."""
    generator = np.random.default_rng(0)
    first = generator.integers(0, 50, (400, 1, PLACES))
    clips = ((first + np.arange(FRAMES)[:, None]) % 50).reshape(400, -1)
    fitted = baselines.fit(counts_of(clips, 50))
    nats = {
        name: float(np.mean([baseline.score(clip, FRAMES).nll[PLACES:] for clip in clips]))
        for name, baseline in fitted.items()
    }
    assert nats["bigram"] < 0.2
    assert nats["previous_frame"] == pytest.approx(math.log(50), abs=0.05)
    assert nats["unigram"] == pytest.approx(math.log(50), abs=0.05)
    assert nats["uniform"] == pytest.approx(math.log(50), abs=1e-5)


def test_fitted_strength_is_best_for_what_is_left_out() -> None:
    counts = counts_of(random_clips(300, 12, 3), 12)
    q = Unigram(counts).q
    found = baselines.fit_strength(counts, q, 0.4)
    assert found is not None
    rows, tokens = np.divmod(counts.keys, 12)
    prior = 0.4 * (rows == tokens) + 0.6 * q[tokens]
    totals = np.bincount(rows, counts.pair_counts, 12)[rows]

    def left_out(k: float) -> float:
        c = counts.pair_counts
        return float((c * np.log((c - 1 + k * prior) / (totals - 1 + k))).sum())

    assert left_out(found) >= max(left_out(k) for k in np.geomspace(1e-2, 1e5, 2000)) - 1e-3


def test_pairs_are_bounded_and_the_rest_still_adds_up() -> None:
    clips = random_clips(300, 200, 4)
    counts = counts_of(clips, 200, max_pairs=500)
    assert len(counts.keys) <= 500 and counts.dropped_share > 0
    baseline = baselines.fit(counts)["bigram"]
    everything = np.stack([np.full(200, 3), np.arange(200)]).ravel()
    scores = baseline.score(everything, 2)
    assert np.exp(-scores.nll[200:].astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert sorted(scores.rank[200:].tolist()) == list(range(200))
