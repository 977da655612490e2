"""Figures: frames of several videos side by side, and loss curves.

Flows in: videos as (3, T, H, W) uint8 and the ``metrics.jsonl`` of runs. Flows out: PNG files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch


def _axes_without_display(
    rows: int,
    columns: int,
    size: tuple[float, float],
    height_ratios: Sequence[float] | None = None,
) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, squeeze=False, height_ratios=height_ratios)


def _save(figure: Any, path: str | Path) -> None:
    from matplotlib import pyplot

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def side_by_side(
    videos: Mapping[str, torch.Tensor],
    path: str | Path,
    frames: Sequence[int],
    captions: Mapping[int, str] | None = None,
) -> None:
    """Draws the same frames of several videos, a video a column and a frame a row.

    Args:
        videos: title -> (3, T, H, W) uint8; all of one size.
        path: the PNG to write.
        frames: numbers of the frames to draw.
        captions: frame number -> text beside its row.
    """
    height, width = next(iter(videos.values())).shape[2:]
    size = (3.2 * len(videos), 3.2 * len(frames) * height / width + 0.3)
    figure, axes = _axes_without_display(len(frames), len(videos), size)
    for column, (title, video) in enumerate(videos.items()):
        for row, frame in enumerate(frames):
            axis = axes[row][column]
            axis.imshow(video[:, frame].permute(1, 2, 0).cpu().numpy())
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(title, fontsize=10)
            if column == 0:
                note = (captions or {}).get(frame, "")
                axis.set_ylabel(f"frame {frame + 1}\n{note}".strip(), fontsize=8)
    figure.subplots_adjust(wspace=0.03, hspace=0.05)
    _save(figure, path)


def contact_sheet(
    rows: Sequence[tuple[str, torch.Tensor, torch.Tensor]], path: str | Path, title: str = ""
) -> None:
    """Draws clips beside their reconstructions: first and last frame, a clip a row.

    Args:
        rows: caption, clip and reconstruction, both (3, T, H, W) uint8; sizes may differ by row.
        path: the PNG to write.
        title: above everything.
    """
    width = 3.6  # inches of a picture
    heights = [width * clip.shape[2] / clip.shape[3] for _, clip, _ in rows]
    size = (4 * width + 0.6, sum(heights) + 0.7)
    figure, axes = _axes_without_display(len(rows), 4, size, heights)
    for line, (caption, clip, reconstruction) in zip(axes, rows, strict=True):
        pictures = [video[:, frame] for frame in (0, -1) for video in (clip, reconstruction)]
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).cpu().numpy())
            axis.set_xticks([])
            axis.set_yticks([])
        if clip.shape[1] == 1:  # an image's first frame is its last
            for axis in line[2:]:
                axis.axis("off")
                axis.images[0].remove()
        line[0].set_ylabel(caption, fontsize=8)
    for axis, which in zip(axes[0], ("first", "first", "last", "last"), strict=True):
        what = "reconstruction" if axis in axes[0][1::2] else "input"
        axis.set_title(f"{what}, {which} frame", fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(h_pad=0.3, w_pad=0.3)
    _save(figure, path)


def read_metrics(log_dir: str | Path) -> list[dict[str, Any]]:
    """All steps of a run's ``metrics.jsonl``, in order."""
    path = Path(log_dir) / "default" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def loss_curves(runs: Mapping[str, str | Path], path: str | Path, title: str = "") -> None:
    """Draws training loss (lines) and validation loss (dots) of several runs.

    Args:
        runs: label -> run folder.
        path: the PNG to write.
        title: above the plot.
    """
    figure, axes = _axes_without_display(1, 1, (7.0, 4.0))
    axis = axes[0][0]
    for label, log_dir in runs.items():
        rows = read_metrics(log_dir)
        (line,) = axis.plot(
            [row["step"] + 1 for row in rows],
            [row["reduced_train_loss"] for row in rows],
            label=f"{label}: training",
        )
        validated = [row for row in rows if row.get("val_loss") is not None]
        if validated:
            axis.plot(
                [row["step"] + 1 for row in validated],
                [row["val_loss"] for row in validated],
                "o",
                color=line.get_color(),
                label=f"{label}: validation",
            )
    axis.set_xlabel("optimizer steps")
    axis.set_ylabel("cross-entropy (nats per token)")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend()
    _save(figure, path)
