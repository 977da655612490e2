"""The training command of a job, checked before it waits in a queue. No torch, no NeMo-Run.

Flows in: the words behind ``--``. Flows out: a ``TrainingJob``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain import cli
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.plan.command import FLAGS, TrainCommand
from cosmos_posttrain.plan.command import validate as check_assumptions
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
    check_assumptions(training)
    num_processes = config.nodes * config.gpus_per_node
    if misfit := training.parallel.misfit(num_processes):  # before it waits in a queue for it
        raise ConfigError(
            f"{misfit}, but --nodes x --gpus_per_node makes {num_processes}; give other numbers, "
            "or choose smaller sizes."
        )
    validate(training.run_config, num_processes)
    if config.repository is None and not _in_container(config):
        arguments = _absolute_config(arguments)
    return in_repository(config, [script, *arguments])


def in_repository(config: SubmitConfig, words: list[str]) -> TrainingJob:
    """A job of words that were checked elsewhere.

    Args:
        config: where it is to run.
        words: what each process calls, behind its interpreter.
    """
    default = CONTAINER_REPOSITORY if _in_container(config) else REPOSITORY_DIR
    return TrainingJob(str(config.repository or default), (config.python, "-u", *words))


def _in_container(config: SubmitConfig) -> bool:
    return config.executor == "kubernetes" or config.container_image is not None


def _absolute_config(arguments: list[str]) -> list[str]:
    """With ``--config`` where it was read, unless the repository's folder has the same file."""
    found = []
    for before, word in zip(["", *arguments[:-1]], arguments, strict=True):
        name, equals, value = word.partition("=")
        if name == "--config" and equals:
            found.append(f"{name}={_where_it_was_read(value)}")
        else:
            found.append(_where_it_was_read(word) if before == "--config" else word)
    return found


def _where_it_was_read(path: str) -> str:
    read = Path(path).resolve()
    return path if read == (REPOSITORY_DIR / path).resolve() else str(read)
