"""``evaluate.py report``: from run folders and evaluations to one page.

Flows in: a ``ReportConfig``. Flows out: ``report.html``, and the same in W&B where asked for.

    run folders --runs--> curves, settings, data --+
    metrics.json --evaluations--> figures, rows ---+--sections--> Page --page--> report.html
    clips/NAME/*.mp4 --clips--> films ------------+
"""

from __future__ import annotations

from datetime import datetime
from importlib import metadata
from pathlib import Path

from cosmos_posttrain import files, launch
from cosmos_posttrain.errors import ConfigError, OutputFolderError
from cosmos_posttrain.evaluation.config.report import ReportConfig, validate
from cosmos_posttrain.evaluation.report import losses, others
from cosmos_posttrain.evaluation.report.clips import Selection, choose_clips
from cosmos_posttrain.evaluation.report.evaluations import Evaluation, find_evaluations
from cosmos_posttrain.evaluation.report.page import Page, render
from cosmos_posttrain.evaluation.report.runs import ReportedRun, open_runs
from cosmos_posttrain.evaluation.report.section import Section
from cosmos_posttrain.evaluation.report.setup import details_section, overview_section
from cosmos_posttrain.evaluation.report.training import training_section
from cosmos_posttrain.evaluation.report.verdict import findings
from cosmos_posttrain.runlog import wants_wandb

_MEGABYTE = 1_000_000
_FIRST = (losses.COMMAND, others.GENERATE)  # the order of the sections


def run(config: ReportConfig) -> Path:
    """Writes the page and returns its path.

    Raises:
        UserError: bad settings or input; nothing was written.
    """
    validate(config)
    if config.wandb and not wants_wandb():
        raise ConfigError(
            "--wandb needs to know where to: set WANDB_API_KEY, or WANDB_MODE=offline, or leave "
            "it out."
        )
    path = config.page
    files.check_writable(path.parent, "the folder of --output")
    if path.is_dir():
        raise OutputFolderError(f"--output {path} is a folder; name a file that ends in .html.")
    runs = open_runs(config.run)
    evaluations = find_evaluations(runs, config.evaluation)
    page, html = compose(config, runs, evaluations)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, html)
    launch.say(_said(path, html, page.samples))
    if config.wandb:
        from cosmos_posttrain.evaluation.report.upload import upload

        upload(page, path, runs[0])
    return path


def compose(
    config: ReportConfig, runs: list[ReportedRun], evaluations: list[Evaluation]
) -> tuple[Page, str]:
    """The page and its HTML, with as many clips as its size allows."""
    sections = _sections(runs, evaluations)
    found = findings(runs, evaluations)
    max_bytes = int(config.max_megabytes * _MEGABYTE)

    def page_with(samples: Selection) -> tuple[Page, str]:
        page = Page(
            title=config.title or " and ".join(run.name for run in runs),
            made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
            findings=found,
            overview=overview_section(runs),
            samples=samples,
            sections=sections,
            version=metadata.version("cosmos_posttrain"),
        )
        return page, render(page)

    _, bare = page_with(Selection([], 0, []))
    room = max_bytes - len(bare.encode())
    selection = choose_clips(evaluations, config.max_clips, room)
    page, html = page_with(selection)
    while len(html.encode()) > max_bytes and selection.clips:  # what stands around the films
        clips = selection.clips[:-1]
        selection = Selection(clips, selection.num_left_out + 1, selection.unreadable)
        page, html = page_with(selection)
    return page, html


def _sections(runs: list[ReportedRun], evaluations: list[Evaluation]) -> list[Section]:
    commands = list(dict.fromkeys(evaluation.command for evaluation in evaluations))
    commands.sort(key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))
    found = []
    for command in commands:
        chosen = [evaluation for evaluation in evaluations if evaluation.command == command]
        is_loss = command == losses.COMMAND
        found.append(
            losses.loss_section(chosen) if is_loss else others.other_section(command, chosen)
        )
    return [training_section(runs), *found, details_section(runs, evaluations)]


def _said(path: Path, html: str, samples: Selection) -> str:
    size = f"{len(html.encode()) / _MEGABYTE:.1f} MB"
    clips = f"{len(samples.clips)} clip{'s' if len(samples.clips) != 1 else ''}"
    if samples.num_left_out:
        clips += f", {samples.num_left_out} left out (--max_clips, --max_megabytes)"
    unreadable = f"; {len(samples.unreadable)} could not be read" if samples.unreadable else ""
    return f"{path}: {size}, {clips}{unreadable}; open it in any browser."
