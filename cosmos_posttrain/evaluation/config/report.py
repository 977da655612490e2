"""What ``evaluate.py report`` shows: its settings, flags and checks. No torch.

Flows in: the command line. Flows out: a ``ReportConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting

# As many as colours can be told apart.
MAX_RUNS = 6
MAX_MEGABYTES = 10
# The page without its clips: curves, tables and code.
_LEAST_MEGABYTES = 2


@dataclass
class ReportConfig:
    """Settings of ``evaluate.py report``.

    Attributes:
        run: a run folder, the ``--log_dir`` of a training; give the flag again for each further run
            that the first is to be compared with.
        evaluation: output folder of another command of this script; give the flag again for each.
            Without it, all that lie in the run folders are shown.
        output: the page; None is ``report.html`` in the first run folder.
        title: heading of the page; None is made of the runs' names.
        max_clips: sample clips that are shown at most, failures first.
        max_megabytes: size of the page at most; clips are left out to stay below.
        wandb: also upload the page, its figures and its videos to the first run's page in W&B.
    """

    run: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)
    output: str | None = None
    title: str | None = None
    max_clips: int = setting(12, at_least=0)
    max_megabytes: float = setting(MAX_MEGABYTES, at_least=_LEAST_MEGABYTES)
    wandb: bool = False

    @property
    def page(self) -> Path:
        """Where the page goes."""
        return Path(self.run[0]) / "report.html" if self.output is None else Path(self.output)


FLAGS = (
    Flag("--run"),
    Flag("--evaluation"),
    Flag("--output"),
    Flag("--title"),
    Flag("--max_clips"),
    Flag("--max_megabytes"),
    Flag("--wandb"),
)


def validate(config: ReportConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.run:
        problems.append("--run is missing: name a run folder, the --log_dir of a training")
    if len(config.run) > MAX_RUNS:
        problems.append(f"--run was given {len(config.run)} times, at most {MAX_RUNS} fit a page")
    if len({Path(run).resolve() for run in config.run}) < len(config.run):
        problems.append("--run names the same folder twice")
    if config.output is not None and Path(config.output).suffix not in (".html", ".htm"):
        problems.append(f"--output {config.output} must end in .html")
    check(config, flag_names(FLAGS), problems)
