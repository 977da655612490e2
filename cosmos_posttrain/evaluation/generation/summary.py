"""All clips together: means between floors and ceiling, drift, and the failure rate.

Flows in: rows of ``scores.score``. Flows out: the ``figures`` of ``metrics.json``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cosmos_posttrain.evaluation.following import Share
from cosmos_posttrain.evaluation.generation.scores import GENERATED, Series, mean_by_frame, mean_of

_ALONE = ("diversity", "sampson_error", "truth_sampson_error")


def figures_of(
    rows: Sequence[Mapping[str, Any]], num_given: int, num_samples: int
) -> dict[str, Any]:
    """Means over clips, each counting once; scalars over the generated frames alone."""
    by_frame = mean_by_frame(rows)
    figures: dict[str, Any] = {"num_clips": len(rows)}
    for what, series in by_frame.items():
        scalars = {name: mean_of(values[num_given:]) for name, values in series.items()}
        figures[what] = scalars | {"by_frame": series}
    figures[GENERATED]["psnr_drift"] = _drift(by_frame[GENERATED], num_given)
    for name in _ALONE:
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            figures[name] = float(np.mean(values))
    return figures | _failures(rows, num_samples)


def _drift(series: Series, num_given: int) -> float | None:
    """Slope of the line through the generated frames' PSNR, dB a frame."""
    values = [value for value in series["psnr"][num_given:] if value is not None]
    if len(values) < 2:
        return None
    return float(np.polyfit(np.arange(len(values)), values, 1)[0])


def _failures(rows: Sequence[Mapping[str, Any]], num_samples: int) -> dict[str, Any]:
    share = Share(sum(row["num_failed_samples"] for row in rows), len(rows) * num_samples)
    kinds = Counter(
        kind
        for row in rows
        for _, kind in {(defect["sample"], defect["kind"]) for defect in row["defects"]}
    )
    return {
        "failure_rate": share.value,
        "failure_rate_interval": list(share.interval),
        "failures_by_kind": dict(sorted(kinds.items())),
        "truth_flagged_rate": float(np.mean([row["is_truth_flagged"] for row in rows])),
    }
