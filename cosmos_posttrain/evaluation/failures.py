"""Which generated clips are failures, as the published failure rates count them.

Flows in: a clip (3, T, H, W) uint8 and how many of its first frames were given. Flows out: its
``Defect``s, none for a clip that is fine. The published definition knows two kinds of severe
distortion, and each has a measure here, taken of frames whose short side is 32 pixels:

    solid_color     the picture degrades to a single colour: its contrast falls to next to nothing
                    and to a fraction of the given frames'
    sudden_object   something large appears that was not there: a connected part of the picture
                    that is found nowhere near in the frame before, or five frames before, as
                    decoders fade in what is new in a latent frame; away from the border, over
                    which things come in by themselves

A clip that stands still, and small artifacts, are no failures. A cut to another picture is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SOLID_COLOR, SUDDEN_OBJECT = "solid_color", "sudden_object"
_SHORT_SIDE = 32
# Grey levels: the spread of a picture that counts as one colour, at most, and its share of the
# given frames' spread, at most.
MAX_CONTRAST = 10.0
MAX_CONTRAST_SHARE = 0.25
# Moves from frame to frame that are followed, and the width of the border: an eighth of the short
# side.
_REACH = 4
_WINDOW = 3  # pixels that are compared together
# Grey levels, the mean over a window and its channels, by which nothing near may come closer.
MIN_NOVELTY = 18.0
# Number of frames -> share of the picture that appears within them, at least: so much, and so many
# times as much as ever in the given frames, where things may move fast.
MIN_AREAS = {1: 0.05, 5: 0.16}
_AREA_FACTOR = 1.5


@dataclass(frozen=True)
class Defect:
    """A severe distortion of a clip.

    Attributes:
        kind: ``solid_color`` or ``sudden_object``.
        frame: where it is first seen.
        measure: the contrast in grey levels, or the share of the picture that appears there.
    """

    kind: str
    frame: int
    measure: float


def find_defects(clip: Tensor, num_given: int) -> list[Defect]:
    """The severe distortions of a clip, at most one of each kind.

    Args:
        clip: (3, T, H, W) uint8.
        num_given: first frames that were given, at least one; they set the standard.
    """
    small = _shrink(clip)
    found = [_solid_color(contrast(small), num_given), _sudden_object(small, num_given)]
    return [defect for defect in found if defect is not None]


def _shrink(clip: Tensor) -> Tensor:
    """(3, T, H, W) uint8 -> (T, 3, h, w) float32 in [0, 255], pixels averaged."""
    height, width = clip.shape[2:]
    scale = _SHORT_SIDE / min(height, width)
    size = (max(round(height * scale), 1), max(round(width * scale), 1))
    return F.adaptive_avg_pool2d(clip.transpose(0, 1).float(), size)


def contrast(small: Tensor) -> Array:
    """(T, 3, h, w) -> (T,): standard deviation over the picture, root mean square of channels."""
    spread: Array = small.double().var((2, 3), correction=0).mean(1).sqrt().numpy()
    return spread


def _solid_color(spread: Array, num_given: int) -> Defect | None:
    standard = float(np.median(spread[:num_given]))
    limit = min(MAX_CONTRAST, MAX_CONTRAST_SHARE * standard)
    is_solid = spread < limit
    is_solid[:num_given] = False
    # A flash of one frame is not what the picture has come to, unless it is the last one.
    stays = is_solid & np.append(is_solid[1:], True)
    if not stays.any():
        return None
    frame = int(np.argmax(stays))
    return Defect(SOLID_COLOR, frame, float(spread[frame]))


def _sudden_object(small: Tensor, num_given: int) -> Defect | None:
    found = []
    for gap, least in MIN_AREAS.items():
        areas = novel_areas(small, gap)
        num_known = max(num_given - gap, 0)  # pairs of given frames
        limit = max(least, _AREA_FACTOR * areas[:num_known].max(initial=0))
        is_sudden = areas[num_known:] >= limit
        if is_sudden.any():
            first = num_known + int(np.argmax(is_sudden))
            found.append(Defect(SUDDEN_OBJECT, first + gap, float(areas[first])))
    return min(found, key=lambda defect: defect.frame, default=None)


def novel_areas(small: Tensor, gap: int) -> Array:
    """Share of each picture that is not in the one ``gap`` before: its largest connected part.

    Args:
        small: (T, 3, h, w) float32 in [0, 255].
        gap: in frames.

    Returns:
        (T - gap,); none of a shorter clip.
    """
    from skimage.measure import label
    from skimage.morphology import opening

    if len(small) <= gap:
        return np.zeros(0)
    areas = []
    for picture in _novelty(small[:-gap], small[gap:]).numpy():
        is_new = picture > MIN_NOVELTY
        is_new[:_REACH] = is_new[-_REACH:] = False
        is_new[:, :_REACH] = is_new[:, -_REACH:] = False
        parts = label(opening(is_new, np.ones((3, 3), bool)), connectivity=1)
        areas.append(np.bincount(parts.flat)[1:].max(initial=0) / picture.size)
    return np.array(areas)


def _novelty(before: Tensor, after: Tensor) -> Tensor:
    """How far every place is from the nearest look near it in an earlier frame.

    Args:
        before: (N, 3, h, w).
        after: (N, 3, h, w).

    Returns:
        (N, h, w) grey levels.
    """
    # All became lighter or darker: the exposure, or a fade.
    shift = (after - before).flatten(2).median(2).values
    padded = F.pad(before + shift[..., None, None], [_REACH] * 4, mode="replicate")
    height, width = after.shape[2:]
    best = after.new_full((len(after), height, width), np.inf)
    for top in range(2 * _REACH + 1):
        for left in range(2 * _REACH + 1):
            moved = padded[:, :, top : top + height, left : left + width]
            gap = (after - moved).abs().mean(1, keepdim=True)
            near = F.avg_pool2d(gap, _WINDOW, 1, _WINDOW // 2, count_include_pad=False)
            best = torch.minimum(best, near[:, 0])
    return best
