"""Confidence intervals: as wide as theory says, and by video."""

from __future__ import annotations

import numpy as np
import pytest

from cosmos_posttrain.evaluation.intervals import interval, resampled_means


def test_width_is_that_of_the_mean_of_videos() -> None:
    generator = np.random.default_rng(1)
    of_videos = generator.normal(5, 2, 400)
    sums = np.repeat(of_videos, 10)[:, None]  # ten equal clips of each say no more than one
    means = resampled_means(sums, np.repeat(np.arange(400), 10))
    assert means is not None
    low, high = interval(means[:, 0])
    expected = 1.96 * of_videos.std() / np.sqrt(400)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.1)
    alone = resampled_means(sums, np.arange(4000))
    assert alone is not None
    assert np.ptp(interval(alone[:, 0])) < 0.4 * (high - low)


def test_columns_are_paired() -> None:
    values = np.random.default_rng(2).normal(size=(50, 1))
    means = resampled_means(np.hstack([values, values + 3]), np.arange(50))
    assert means is not None
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 3)


def test_videos_count_by_their_clips_and_one_says_nothing() -> None:
    assert resampled_means(np.ones((5, 1)), np.zeros(5, int)) is None
    means = resampled_means(np.array([[0.0], [1.0], [1.0]]), np.array([7, 9, 9]), 100)
    assert means is not None
    assert set(np.round(means[:, 0], 6)) == {0.0, 0.666667, 1.0}
