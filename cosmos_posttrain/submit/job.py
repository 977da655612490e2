"""The training command of a job, checked before it waits in a queue. No torch, no NeMo-Run.

Flows in: the words behind ``--``. Flows out: a ``TrainingJob``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain import cli
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.plan.command import FLAGS, TrainCommand
from cosmos_posttrain.submit.config import SubmitConfig
from cosmos_posttrain.training.config import validate

SCRIPTS = ("train_general.py", "train_video2world.py")
REPOSITORY_DIR = Path(__file__).resolve().parents[2]
# Where the Dockerfile puts the repository.
CONTAINER_REPOSITORY = "/workspace/cosmos_posttrain"


@dataclass(frozen=True)
class TrainingJob:
    """One process's command, for any launcher.

    Attributes:
        repository: folder that the command is called in, where it runs.
        words: of the command, from the interpreter on.
    """

    repository: str
    words: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The words, called in the repository's folder wherever the launcher stands."""
        return ["env", f"--chdir={self.repository}", *self.words]


def make_job(config: SubmitConfig, command: list[str]) -> TrainingJob:
    """Checks the training command's flags, YAML and sizes; data and model may lie elsewhere.

    Raises:
        ConfigError: it is not one of the training scripts', or would end with a sentence at once.
    """
    if not command or command[0] not in SCRIPTS:
        given = f"{command[0]} is none" if command else "there is none"
        raise ConfigError(
            f"behind -- belongs the command of {' or '.join(SCRIPTS)}, and {given}; write ... -- "
            "train_general.py --config FILE --data_path D --log_dir L."
        )
    script, *arguments = command
    training = cli.parse(TrainCommand, FLAGS, arguments, script, "")
    if training.dry_run:
        raise ConfigError("--dry_run needs no launcher; call the training script by itself.")
    validate(training.run_config, config.nodes * config.gpus_per_node)
    in_container = config.executor == "kubernetes" or config.container_image is not None
    repository = config.repository or (CONTAINER_REPOSITORY if in_container else REPOSITORY_DIR)
    return TrainingJob(str(repository), (config.python, "-u", *command))
