"""One clip: how close each continuation comes to the truth, frame by frame, and what fails.

Flows in: the truth, the tokenizer's reconstruction and the generated samples of a clip, all
(3, T, H, W) uint8. Flows out: its row, in which ``by_frame`` has T numbers for each quantity of
each continuation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cosmos_posttrain.evaluation import quality
from cosmos_posttrain.evaluation.failures import find_defects
from cosmos_posttrain.evaluation.following import locate
from cosmos_posttrain.evaluation.generation import guesses
from cosmos_posttrain.evaluation.generation.sampson import sampson_error
from cosmos_posttrain.evaluation.lpips import LPIPS
from cosmos_posttrain.evaluation.positions import MIN_VISIBLE, position_errors
from cosmos_posttrain.evaluation.world_truth import WorldTruth

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

GENERATED, RECONSTRUCTION = "generated", "reconstruction"
_DECIMALS = 4
Series = dict[str, list[float | None]]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is known of a clip.

    Attributes:
        truth: (3, T, H, W) uint8.
        reconstruction: of the stored tokens; the truth itself where there is no other.
        num_given: first frames that were given, at least one.
        world: the truth of a small world's clip, of these T frames; None for other clips.
    """

    truth: Tensor
    reconstruction: Tensor
    num_given: int
    world: WorldTruth | None = None

    @property
    def has_ceiling(self) -> bool:
        """Whether the truth is more than the reconstruction."""
        return self.truth is not self.reconstruction


def score(
    case: Case, samples: Sequence[Tensor], lpips: LPIPS | None = None, sampson: bool = False
) -> dict[str, Any]:
    """Compares a clip's samples, the floors and the ceiling with the truth.

    Args:
        case: the clip.
        samples: (3, T, H, W) uint8 each, at least one.
        lpips: where there are weights.
        sampson: measure 3D consistency too.
    """
    num_frames, given = case.truth.shape[1], case.num_given
    known = case.reconstruction[:, :given]  # as the model got them
    each = [_series(case, sample, lpips) for sample in samples]
    by_frame: dict[str, Series] = {GENERATED: _mean_series(each)}
    if case.has_ceiling:
        by_frame[RECONSTRUCTION] = _series(case, case.reconstruction, lpips)
    by_frame[guesses.REPEAT] = _series(case, guesses.repeat_last_frame(known, num_frames), lpips)
    if given > 1 and guesses.has_opencv():
        moved = guesses.constant_motion(known, num_frames)
        by_frame[guesses.MOTION] = _series(case, moved, lpips)
    row: dict[str, Any] = {
        name: mean_of(values[given:]) for name, values in by_frame[GENERATED].items()
    }
    row["defects"] = [
        dataclasses.asdict(defect) | {"sample": number}
        for number, sample in enumerate(samples)
        for defect in find_defects(sample, given)
    ]
    row["num_failed_samples"] = len({defect["sample"] for defect in row["defects"]})
    # What the detectors say of a clip that no model has touched.
    row["is_truth_flagged"] = bool(find_defects(case.truth, given))
    if len(samples) > 1:
        row["diversity"] = diversity([sample[:, given:] for sample in samples])
    if sampson:
        # From the last given frame on, which all have in common.
        errors = [sampson_error(sample, given - 1) for sample in samples]
        row["sampson_error"] = mean_of(errors)
        row["truth_sampson_error"] = sampson_error(case.truth, given - 1)
    return row | {"by_frame": by_frame}


def _series(case: Case, clip: Tensor, lpips: LPIPS | None) -> Series:
    """Each quantity of each frame of a clip, against the truth."""
    num_threads = torch.get_num_threads()
    found: dict[str, Sequence[float]] = {
        "psnr": quality.psnr_by_frame(case.truth, clip, num_threads),
        "ssim": quality.ssim_by_frame(case.truth, clip, num_threads),
    }
    if lpips is not None:
        found["lpips"] = lpips.by_frame(case.truth, clip)
    if case.world is not None:
        found["position_error"] = world_errors(case.world, clip).tolist()
    return {name: [_rounded(value) for value in values] for name, values in found.items()}


def _rounded(value: float) -> float | None:
    return round(float(value), _DECIMALS) if np.isfinite(value) else None


def world_errors(world: WorldTruth, clip: Tensor) -> Array:
    """(T,) pixels: the mean distance of a small world's objects from where they should be.

    An object that cannot be seen in the truth does not count; NaN where none can.
    """
    found = locate(clip.permute(1, 2, 3, 0).numpy(), world)
    errors = position_errors(found, world.positions, world.height, world.width)
    seen = world.visible >= MIN_VISIBLE
    counts = seen.sum(1)
    sums = np.where(seen, errors, 0).sum(1)
    result: Array = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return result


def diversity(samples: Sequence[Tensor]) -> float:
    """Root mean square difference in grey levels, the mean over pairs of samples."""
    pairs = combinations([sample.float() for sample in samples], 2)
    return float(np.mean([(a - b).square().mean().sqrt() for a, b in pairs]))


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _mean_series(items: Sequence[Mapping[str, Sequence[float | None]]]) -> Series:
    """Frame by frame over several clips of equal length."""
    return {
        name: [mean_of(column) for column in zip(*(item[name] for item in items), strict=True)]
        for name in items[0]
    }


def mean_by_frame(rows: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """The ``by_frame`` of many rows; a quantity that some lack is the mean of the others."""
    found: dict[str, Series] = {}
    for what in dict.fromkeys(key for row in rows for key in row["by_frame"]):
        own = [row["by_frame"][what] for row in rows if what in row["by_frame"]]
        names = dict.fromkeys(name for item in own for name in item)
        found[what] = {
            name: _mean_series([{name: item[name]} for item in own if name in item])[name]
            for name in names
        }
    return found
