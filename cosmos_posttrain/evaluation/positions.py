"""Where objects of known colours are in frames. numpy only.

Flows in: frames as (T, H, W, 3) uint8, true, reconstructed or generated, and the objects' colours.
Flows out: positions (T, K, 2) in pixels, NaN where an object is not found; how far they are from
the truth, and which way something went. Positions are (x, y), x to the right and y down, (0, 0) at
the centre of the first pixel.

An object is looked for as a disc of its diameter that differs from the ground by its colour.
Tokenizers blur, bleach and smear, so a place counts by the mean colour of the disc there (less half
the colour of a ring around it), and the exact position is where the disc fits best. What one object
covers says nothing about those behind it: such pixels are left out for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

# Moves below so many pixels have no direction.
MIN_MOVE = 3.0
# 1 is a disc of exactly the object's colour, 0 is bare ground.
MIN_SCORE = 0.4
# Share of a disc that must lie in the picture and not behind another object.
MIN_VISIBLE = 0.35
DIAMETERS = (12.0, 16.0, 20.0, 24.0, 28.0, 32.0, 38.0, 44.0)

# Inner and outer radius of the ring, and its weight.
_RING = (1.15, 1.5)
_RING_WEIGHT = 0.5
# So much of the disc's colour the ring may have.
_MAX_RING = 0.6
_NAMING_ROUNDS = 3
# Grey levels between an object and the ground.
_MIN_CONTRAST = 30.0


def find_objects(
    frames: NDArray[np.uint8],
    colors: ArrayLike,
    diameters: float | Sequence[float] | None = None,
    min_score: float = MIN_SCORE,
) -> Array:
    """Finds each object in each frame.

    Args:
        frames: (T, H, W, 3) uint8 RGB, most of it ground.
        colors: (K, 3) RGB in [0, 255], one for each object, all different.
        diameters: in pixels, of a disc of the object's area; None tries several.
        min_score: a place must be so similar to the object: 1 is equal, 0 is ground.

    Returns:
        (T, K, 2) float64 (x, y); NaN where an object is not found.

    Raises:
        ValueError: frames of another shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames are {frames.shape} {frames.dtype}, not (T, H, W, 3) uint8")
    wanted = np.atleast_2d(np.asarray(colors, np.float64))
    ground = np.median(frames.reshape(-1, 3), axis=0)
    offsets = frames - ground
    wanted = wanted - ground
    found = np.full((len(frames), len(wanted), 2), np.nan)
    # Where the ground has an object's colour, a clip that has become one colour say, it is nowhere.
    stands_out = np.flatnonzero(np.linalg.norm(wanted, axis=1) >= _MIN_CONTRAST)
    if not len(stands_out):
        return found
    if diameters is None:
        sizes = [_best_diameter(offsets, wanted[k], min_score) for k in stands_out]
    else:
        sizes = [float(np.broadcast_to(diameters, len(wanted))[k]) for k in stands_out]
    wanted = wanted[stands_out]
    discs = {size: _Disc(size, *frames.shape[1:3]) for size in sizes}
    blobs = [_find_blobs(frame, wanted, sizes, discs, min_score) for frame in offsets]
    found[:, stands_out] = _name_blobs(blobs, wanted, min_score)
    return found


def position_errors(found: Array, truth: Array, height: int, width: int) -> Array:
    """Distances in pixels; an object that is not found counts with the picture's diagonal.

    Args:
        found: (..., 2), NaN where not found.
        truth: (..., 2).
        height: of the picture.
        width: likewise.

    Returns:
        (...) float64.
    """
    distances = np.hypot(*np.moveaxis(found - truth, -1, 0))
    return np.where(np.isnan(distances), math.hypot(height, width), distances)


def direction_name(move: ArrayLike, directions: str = "4", least: float = MIN_MOVE) -> str:
    """The nearest of four or eight directions in words.

    Args:
        move: (2,) pixels (x, y); NaN where an object was not found.
        directions: ``4`` (left, right, up, down), or more, such as ``up and to the left``.
        least: shorter moves have no direction.

    Returns:
        The words that captions use; "" without a direction.
    """
    x, y = np.asarray(move, np.float64)
    if not math.hypot(x, y) >= least:
        return ""
    eighth = math.atan2(y, x) / (2 * math.pi) * 8
    eighth = (round(eighth / 2) * 2 if directions == "4" else round(eighth)) % 8
    side = {0: "right", 1: "right", 7: "right", 3: "left", 4: "left", 5: "left"}.get(eighth, "")
    vertical = {1: "down", 2: "down", 3: "down", 5: "up", 6: "up", 7: "up"}.get(eighth, "")
    return f"{vertical} and to the {side}" if vertical and side else vertical or side


class _Disc:
    """Sums over a disc, and over a ring around it, at every pixel of a picture.

    Args:
        diameter: in pixels.
        height: of the picture.
        width: likewise.
    """

    def __init__(self, diameter: float, height: int, width: int) -> None:
        radius = diameter / 2
        self.reach = int(np.ceil(radius * _RING[1])) + 1
        y, x = np.mgrid[-self.reach : self.reach + 1, -self.reach : self.reach + 1]
        distance = np.hypot(x, y)
        inner, disc, outer = (
            np.clip(edge - distance + 0.5, 0, 1)
            for edge in (radius * _RING[0], radius, radius * _RING[1])
        )
        self.area = float(disc.sum())
        self._size = (height, width)
        self._padded = (height + 2 * self.reach, width + 2 * self.reach)
        kernels = np.stack([disc, outer - inner, disc**2])
        self._kernels = np.fft.rfft2(kernels, self._padded).conj()
        self._bare = self._sums(np.ones(self._size))

    def _sums(self, picture: Array) -> Array:
        """(..., H, W) -> (3, ..., H, W): sums under the disc, the ring and the squared disc."""
        edge = [(0, 0)] * (picture.ndim - 2) + [(self.reach, self.reach)] * 2
        spectrum = np.fft.rfft2(np.pad(picture, edge))
        kernels = self._kernels.reshape(3, *[1] * (picture.ndim - 2), *self._kernels.shape[1:])
        height, width = self._size
        return np.fft.irfft2(spectrum * kernels, self._padded)[..., :height, :width]

    def look(self, offsets: Array, seen: Array | None) -> _View:
        """What lies under the disc at every place.

        Args:
            offsets: (H, W, 3) colours less the ground's.
            seen: (H, W), 0 where pixels say nothing; None is 1 everywhere.
        """
        channels = offsets.transpose(2, 0, 1)
        counts = self._bare if seen is None else self._sums(seen)
        sums = self._sums(channels if seen is None else channels * seen)
        in_disc, in_ring, squared = (np.maximum(count, 1e-6) for count in counts)
        ring = sums[1] / np.maximum(in_ring, 1)
        valid = counts[0] >= MIN_VISIBLE * self.area
        return _View(sums[0] / in_disc, ring, sums[0], squared, valid)


class _View:
    """One frame, seen through a disc of one size.

    Args:
        disc: (3, H, W) mean colour of the disc.
        ring: (3, H, W) mean colour of the ring.
        sums: (3, H, W) of the colours under the disc.
        weights: (H, W) of the squared disc.
        valid: (H, W) where enough of the disc is seen.
    """

    def __init__(
        self, disc: Array, ring: Array, sums: Array, weights: Array, valid: NDArray[np.bool_]
    ) -> None:
        self._means = disc - _RING_WEIGHT * ring
        self._disc, self._ring, self._sums, self._weights = disc, ring, sums, weights
        self._valid = valid

    def best(self, color: Array) -> tuple[float, int, int]:
        """Score, row and column of the place that is most like a disc of this colour."""
        distance = ((self._means - color[:, None, None]) ** 2).sum(0)
        # The middle of something larger is no disc.
        around = np.tensordot(color, self._ring - _MAX_RING * self._disc, 1)
        score = np.where(self._valid & (around <= 0), 1 - distance / (color @ color), -np.inf)
        row, column = divmod(int(score.argmax()), score.shape[1])
        return float(score[row, column]), row, column

    def color(self, row: int, column: int) -> Array:
        """(3,) of a place."""
        return self._means[:, row, column]

    def refine(self, row: int, column: int, radius: float) -> tuple[float, float, float]:
        """Near a place, where a disc of the colour found there fits best (least squares).

        Returns:
            x, y, and how much of the squared difference from the ground the disc explains.
        """
        color = self.color(row, column)
        fit = 2 * np.tensordot(color, self._sums, 1) / (color @ color) - self._weights
        top, left = max(row - int(radius), 0), max(column - int(radius), 0)
        window = fit[top : row + int(radius) + 1, left : column + int(radius) + 1]
        y, x = divmod(int(window.argmax()), window.shape[1])
        explained = float(window[y, x] * (color @ color))
        return left + x + _vertex(window[y], x), top + y + _vertex(window[:, x], y), explained


def _vertex(values: Array, index: int) -> float:
    """Where a parabola through a peak and its neighbours is highest, relative to the peak."""
    if not 0 < index < len(values) - 1:
        return 0.0
    before, peak, after = values[index - 1 : index + 2]
    bend = before - 2 * peak + after
    return float(np.clip((before - after) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0


class _Blob(NamedTuple):
    """Something in a frame that might be an object.

    Attributes:
        place: (x, y).
        color: (3,) less the ground's.
    """

    place: tuple[float, float]
    color: Array


def _find_blobs(
    offsets: Array, colors: Array, sizes: list[float], discs: dict[float, _Disc], min_score: float
) -> list[_Blob]:
    """What looks like any of the objects: the most certain first, others without its pixels."""
    blobs: list[_Blob] = []
    y, x = np.mgrid[: offsets.shape[0], : offsets.shape[1]]
    seen = None
    for _ in range(len(colors) + (len(colors) > 1)):
        views = {size: discs[size].look(offsets, seen) for size in set(sizes)}
        scored = [(*views[size].best(c), size) for c, size in zip(colors, sizes, strict=True)]
        score, row, column, size = max(scored)
        if score < min_score:
            break
        *place, _ = views[size].refine(row, column, size / 4)
        blobs.append(_Blob((place[0], place[1]), views[size].color(row, column)))
        outside = np.hypot(x - place[0], y - place[1]) > size / 2
        seen = outside * (1.0 if seen is None else seen)
    return blobs


def _name_blobs(blobs: list[list[_Blob]], wanted: Array, min_score: float) -> Array:
    """Says which blob is which object: (T, K, 2) positions.

    Tokenizers shift colours, but in all frames alike: so blobs are compared with the colours that
    the objects had in the clip, at first with the true ones.
    """
    colors = wanted.copy()
    for _ in range(_NAMING_ROUNDS if len(wanted) > 1 else 1):
        named = [_match(frame, colors, wanted, min_score) for frame in blobs]
        for k in range(len(wanted)):
            numbered = zip(blobs, named, strict=True)
            own = [frame[row[k]].color for frame, row in numbered if row[k] >= 0]
            colors[k] = np.median(own, 0) if own else wanted[k]
    nowhere = (np.nan, np.nan)
    return np.array(
        [
            [frame[i].place if i >= 0 else nowhere for i in row]
            for frame, row in zip(blobs, named, strict=True)
        ]
    )


def _match(blobs: list[_Blob], colors: Array, wanted: Array, min_score: float) -> tuple[int, ...]:
    """For each object the number of its blob, -1 for none: the best of all ways to share them."""
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by the blobs that are taken
    for color, true_color in zip(colors, wanted, strict=True):
        longer = {taken: (total, (*way, -1)) for taken, (total, way) in best.items()}
        for i, blob in enumerate(blobs):
            if _score(blob.color, true_color) < min_score:
                continue
            gain = 1 + _score(blob.color, color)
            for taken, (total, way) in best.items():
                now = taken | 1 << i
                if now != taken and total + gain > longer.get(now, (0.0,))[0]:
                    longer[now] = (total + gain, (*way, i))
        best = longer
    return max(best.values())[1]


def _score(color: Array, wanted: Array) -> float:
    return float(1 - ((color - wanted) ** 2).sum() / (wanted @ wanted))


def _best_diameter(offsets: Array, color: Array, min_score: float) -> float:
    """The diameter of the disc that explains most, in a few frames."""
    picked = offsets[np.linspace(0, len(offsets) - 1, 3).astype(int)]
    explained = []
    for size in DIAMETERS:
        disc = _Disc(size, *offsets.shape[1:3])
        explained.append(0.0)
        for view in (disc.look(frame, None) for frame in picked):
            score, row, column = view.best(color)
            if score >= min_score:
                explained[-1] += view.refine(row, column, size / 4)[2]
    return DIAMETERS[int(np.argmax(explained))]
