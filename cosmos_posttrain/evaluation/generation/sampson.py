"""3D consistency by the Sampson error: whether the points of two frames can be one rigid scene.

Flows in: a clip (3, T, H, W) uint8. Flows out: pixels, 0 for a perfect scene; None where too few
points are found twice. For points x and x' of two frames, homogeneous, and the fundamental matrix F
that fits most of them (Hartley and Zisserman, 2nd edition, equation 11.9):

    error^2 = (x'^T F x)^2 / ((F x)_1^2 + (F x)_2^2 + (F^T x')_1^2 + (F^T x')_2^2)

Points are SIFT's, matched both ways; F is found by RANSAC (MAGSAC), and the error is taken over
all matches, so that what moves by itself, or melts, counts. Needs OpenCV. Things that really move
have an error too: compare with that of the truth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.float64]

GAP = 4  # frames between the two of a pair, so that there is a parallax
MIN_MATCHES = 16
_THRESHOLD = 1.0  # pixels within which a match fits
_CONFIDENCE, _MAX_ROUNDS = 0.999, 10_000
_SEED = 0


def sampson_error(clip: Tensor, first: int = 0) -> float | None:
    """The median over matches, and the mean over pairs of frames ``GAP`` apart.

    Args:
        clip: (3, T, H, W) uint8.
        first: frame of the first pair's first.
    """
    from cv2 import COLOR_RGB2GRAY, SIFT, cvtColor, setNumThreads

    setNumThreads(1)
    finder: Any = SIFT.create()
    frames = clip[:, first:].permute(1, 2, 3, 0).numpy()
    gray = [cvtColor(np.ascontiguousarray(frame), COLOR_RGB2GRAY) for frame in frames]
    found = [finder.detectAndCompute(frame, None) for frame in gray]
    gap = min(GAP, len(found) - 1)
    if gap < 1:
        return None
    pairs = zip(found[:-gap], found[gap:], strict=True)
    errors = [error for pair in pairs if (error := _of_pair(*pair)) is not None]
    return float(np.mean(errors)) if errors else None


def _of_pair(first: tuple[Any, Any], second: tuple[Any, Any]) -> float | None:
    """Of keypoints and descriptors of two frames."""
    import cv2

    if any(descriptors is None for _, descriptors in (first, second)):
        return None
    matches = cv2.BFMatcher(cv2.NORM_L2, crossCheck=True).match(first[1], second[1])
    if len(matches) < MIN_MATCHES:
        return None
    points = np.array([first[0][m.queryIdx].pt for m in matches], np.float64)
    others = np.array([second[0][m.trainIdx].pt for m in matches], np.float64)
    cv2.setRNGSeed(_SEED)
    matrix, _ = cv2.findFundamentalMat(
        points, others, cv2.USAC_MAGSAC, _THRESHOLD, _CONFIDENCE, _MAX_ROUNDS
    )
    if matrix is None or matrix.shape != (3, 3):
        return None
    return float(np.median(distances(points, others, matrix.astype(np.float64))))


def distances(points: Array, others: Array, matrix: Array) -> Array:
    """The error of the module docstring: (N, 2) pixels twice and F (3, 3) -> (N,)."""
    left, right = (np.column_stack([values, np.ones(len(values))]) for values in (points, others))
    lines, back = left @ matrix.T, right @ matrix
    residual = (right * lines).sum(1)
    scale = (lines[:, :2] ** 2).sum(1) + (back[:, :2] ** 2).sum(1)
    result: Array = np.abs(residual) / np.sqrt(np.maximum(scale, np.finfo(np.float64).tiny))
    return result
