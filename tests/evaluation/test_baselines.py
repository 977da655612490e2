"""The floors of a loss: against closed forms, and against distributions written out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cosmos_posttrain.evaluation import baselines, scoring
from cosmos_posttrain.evaluation.baselines import SamePlace, Uniform, Unigram
from cosmos_posttrain.evaluation.training_counts import Counter, TrainingCounts, joined

FRAMES, PLACES = 3, 5


def counts_of(clips: np.ndarray, vocab_size: int, max_pairs: int = 10**6) -> TrainingCounts:
    counter = Counter(vocab_size, FRAMES, max_pairs)
    for clip in clips:
        counter.add(clip)
    return counter.result()


def fit_on(clips: np.ndarray, vocab_size: int, max_pairs: int = 10**6) -> dict[str, Any]:
    halves = [counts_of(part, vocab_size, max_pairs) for part in (clips[::2], clips[1::2])]
    return baselines.fit(halves[0], halves[1])


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


def test_smoothing_is_best_for_the_other_half() -> None:
    first, second = np.array([9, 5, 1, 0, 0, 1]), np.array([7, 1, 0, 2, 0, 3])
    found = baselines.fit_smoothing(first, second)

    def other_half(a: float) -> float:
        p, q = ((n + a) / (n.sum() + 6 * a) for n in (first, second))
        return float((second * np.log(p)).sum() + (first * np.log(q)).sum())

    assert other_half(found) >= max(other_half(a) for a in np.geomspace(1e-3, 1e3, 2000)) - 1e-6


def test_halves_that_share_nothing_trust_nothing() -> None:
    """Counts of other videos say nothing here, however often they say it."""
    clips = np.stack([np.full(15, 3), np.full(15, 8)] * 50)
    clips[:, 7] = np.arange(100) % 50
    fitted = fit_on(clips, 50)
    assert fitted["unigram"].settings["smoothing"] > 100
    assert fitted["previous_frame"].settings["stay"] > 0.7


def test_stay_has_a_closed_form_under_a_uniform_background() -> None:
    """s + (1 - s) / V is the share of tokens that stay."""
    counts = counts_of(random_clips(200, 20, 0), 20)
    share = counts.kept.sum() / counts.num_pairs
    found = baselines.fit_stay([(counts, np.full(20, 1 / 20))] * 2)
    assert found + (1 - found) / 20 == pytest.approx(share, abs=1e-9)


def test_stay_at_its_ends() -> None:
    still = counts_of(np.zeros((2, 15), np.int64), 3)
    assert 1 - 1e-1 < baselines.fit_stay([(still, np.full(3, 1 / 3))]) < 1
    flipping = counts_of(np.array([[0] * 5 + [1] * 5 + [0] * 5]), 2)
    assert baselines.fit_stay([(flipping, np.full(2, 1 / 2))]) == 0
    image, nothing = Counter(5, 1, 100), Counter(5, 1, 100)
    image.add(np.arange(5))
    fitted = baselines.fit(image.result(), nothing.result())
    for name, baseline in fitted.items():
        nll = baseline.score(np.arange(5), 1).nll
        np.testing.assert_allclose(nll, math.log(5), rtol=1e-5, err_msg=name)


def test_counts_add_up() -> None:
    clips = random_clips(40, 30, 7)
    parts = joined(counts_of(clips[:13], 30), counts_of(clips[13:], 30))
    whole = counts_of(clips, 30)
    for name in ("tokens", "kept", "keys", "pair_counts"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))
    assert (parts.num_pairs, parts.num_clips) == (whole.num_pairs, whole.num_clips)


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
    unigram = Unigram(counts, 0.7)
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
    fitted = fit_on(clips, 50)
    nats = {
        name: float(np.mean([baseline.score(clip, FRAMES).nll[PLACES:] for clip in clips]))
        for name, baseline in fitted.items()
    }
    assert nats["bigram"] < 0.2
    assert nats["previous_frame"] == pytest.approx(math.log(50), abs=0.05)
    assert nats["unigram"] == pytest.approx(math.log(50), abs=0.05)
    assert nats["uniform"] == pytest.approx(math.log(50), abs=1e-5)


def test_strength_is_best_for_the_other_half() -> None:
    first, second = (counts_of(random_clips(150, 12, seed), 12) for seed in (3, 5))
    q = np.random.default_rng(0).dirichlet(np.ones(12))
    found = baselines.fit_strength([(first, second, q), (second, first, q)], 0.4)
    assert found is not None

    def other_half(k: float) -> float:
        tables = [written_out(counts, q, 0.4, k).ravel() for counts in (second, first)]
        return sum(
            float((counts.pair_counts * np.log(table[counts.keys])).sum())
            for counts, table in zip((first, second), tables, strict=True)
        )

    assert other_half(found) >= max(other_half(k) for k in np.geomspace(1e-2, 1e5, 2000)) - 1e-3


def test_pairs_are_bounded_and_the_rest_still_adds_up() -> None:
    clips = random_clips(300, 200, 4)
    counts = counts_of(clips, 200, max_pairs=500)
    assert len(counts.keys) <= 500 and counts.dropped_share > 0
    baseline = fit_on(clips, 200, max_pairs=500)["bigram"]
    everything = np.stack([np.full(200, 3), np.arange(200)]).ravel()
    scores = baseline.score(everything, 2)
    assert np.exp(-scores.nll[200:].astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert sorted(scores.rank[200:].tolist()) == list(range(200))
