"""The page's figures and videos in W&B, beside the first run's own curves.

Flows in: a ``Page`` that was written. Flows out: one row of pictures, videos and the page in the
W&B run of the training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos_posttrain.evaluation.report.page import Page
from cosmos_posttrain.evaluation.report.runs import ReportedRun
from cosmos_posttrain.runlog import start_wandb


def upload(page: Page, path: Path, run: ReportedRun) -> None:
    """Uploads everything; the caller has asked ``wants_wandb``."""
    import wandb

    session = start_wandb(None, run.folder / "default")
    try:
        session.log(_media(page, path, wandb))
    finally:
        session.finish()


def _media(page: Page, path: Path, wandb: Any) -> dict[str, Any]:
    media: dict[str, Any] = {"report/page": wandb.Html(path.read_text(encoding="utf-8"))}
    for section in page.sections:
        for chart in section.charts:
            media[f"report/{chart.name}"] = wandb.Image(chart.png(), caption=chart.description)
    for clip in page.samples.clips:
        for film in clip.films:
            key = f"report/{clip.evaluation}/{clip.name}/{film.title}"
            media[key] = wandb.Video(str(film.path), format="mp4")
    return media
