"""Where a training run is to go. No torch, no NeMo-Run.

Flows in: the command line before ``--``. Flows out: a ``SubmitConfig``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting

EXECUTORS = ("local", "slurm", "kubernetes")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_TIME = re.compile(r"(\d+-)?\d{1,2}:\d\d:\d\d")
_VARIABLE = re.compile(r"[A-Za-z_]\w*")


@dataclass
class SubmitConfig:
    """Where and how a training run is started.

    Attributes:
        executor: ``local``, ``slurm`` or ``kubernetes``.
        nodes: machines.
        gpus_per_node: GPUs, and processes, of each machine.
        render: print what would be handed over, and start nothing.
        name: of the job; small letters, digits and hyphens.
        repository: folder of this repository where the job runs; None means this one, and in a
            container /workspace/cosmos_posttrain. Paths of the training command start from it.
        python: interpreter there.
        container_image: image that the job runs in; Kubernetes needs one, Slurm takes it by pyxis.
        container_mounts: HOST:CONTAINER folders of a Slurm job's container, with commas between.
        account: Slurm's account.
        partition: Slurm's partition.
        time: Slurm's limit, HH:MM:SS or D-HH:MM:SS; in YAML in quotes.
        signal_seconds: how long before Slurm's limit the run is asked to save and end.
        retries: how often Slurm queues a job that ended early again, or torchrun restarts the
            processes of a Kubernetes job.
        sbatch_option: a further option of sbatch as name=value, such as qos=high.
        namespace: Kubernetes' namespace.
        runtime: name of the Kubeflow ClusterTrainingRuntime.
        volume: a volume claim and where it is mounted, as CLAIM:/folder.
        secret: Kubernetes secret that holds the keys named by ``secret_env``.
        secret_env: an environment variable that comes from ``secret``, such as WANDB_API_KEY.
    """

    executor: str = setting("local", choices=EXECUTORS)
    nodes: int = setting(1, at_least=1)
    gpus_per_node: int = setting(8, at_least=1)
    render: bool = False
    name: str = "cosmos-train"
    repository: str | None = None
    python: str = "python"
    container_image: str | None = None
    container_mounts: str | None = None
    account: str | None = None
    partition: str | None = None
    time: str = "04:00:00"
    signal_seconds: int = setting(300, at_least=1, at_most=65535)
    retries: int = setting(3, at_least=0)
    sbatch_option: list[str] = field(default_factory=list)
    namespace: str = "default"
    runtime: str = "torch-distributed"
    volume: list[str] = field(default_factory=list)
    secret: str | None = None
    secret_env: list[str] = field(default_factory=list)


FLAGS = (
    Flag("--executor"),
    Flag("--nodes"),
    Flag("--gpus_per_node"),
    Flag("--render"),
    Flag("--name"),
    Flag("--repository"),
    Flag("--python"),
    Flag("--container_image"),
    Flag("--container_mounts"),
    Flag("--account"),
    Flag("--partition"),
    Flag("--time"),
    Flag("--signal_seconds"),
    Flag("--retries"),
    Flag("--sbatch_option"),
    Flag("--namespace"),
    Flag("--runtime"),
    Flag("--volume"),
    Flag("--secret"),
    Flag("--secret_env"),
)


def validate(config: SubmitConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not _NAME.fullmatch(config.name):
        problems.append(f"--name {config.name} must be small letters, digits and hyphens")
    if config.executor == "local" and config.nodes > 1:
        problems.append(f"--nodes {config.nodes} needs --executor slurm or kubernetes")
    problems += _executor_problems(config)
    if config.executor == "slurm":
        problems += [] if config.account else ["--executor slurm needs --account"]
        if not _TIME.fullmatch(config.time):
            problems.append(
                f"--time {config.time} must be HH:MM:SS or D-HH:MM:SS; in YAML put it in quotes"
            )
        wrong = [item for item in config.sbatch_option if not re.fullmatch(r"[\w-]+=.*", item)]
        problems += [f"--sbatch_option {item} must be name=value" for item in wrong]
    if config.executor == "kubernetes":
        problems += _kubernetes_problems(config)
    check(config, flag_names(FLAGS), problems)


def _executor_problems(config: SubmitConfig) -> list[str]:
    """What has no effect with this executor, and would be taken for granted."""
    wrong = []
    for name, executors in (
        ("container_image", ("slurm", "kubernetes")),
        ("container_mounts", ("slurm",)),
        ("account", ("slurm",)),
        ("partition", ("slurm",)),
        ("sbatch_option", ("slurm",)),
        ("volume", ("kubernetes",)),
        ("secret", ("kubernetes",)),
        ("secret_env", ("kubernetes",)),
    ):
        if getattr(config, name) and config.executor not in executors:
            wrong.append(
                f"--{name} has no effect with --executor {config.executor}: it is for "
                + " and ".join(executors)
            )
    if config.container_mounts and not config.container_image and config.executor == "slurm":
        wrong.append("--container_mounts needs --container_image")
    return wrong


def _kubernetes_problems(config: SubmitConfig) -> list[str]:
    problems = []
    if not config.container_image:
        problems.append("--executor kubernetes needs --container_image")
    for item in config.volume:
        claim, _, folder = item.partition(":")
        if not _NAME.fullmatch(claim) or not folder.startswith("/"):
            problems.append(f"--volume {item} must be CLAIM:/folder")
    for item in config.secret_env:
        if not _VARIABLE.fullmatch(item):
            problems.append(
                "--secret_env takes the name of a variable, never its value, which belongs into "
                "the secret"
            )
    if config.secret_env and not config.secret:
        problems.append("--secret_env needs --secret, the Kubernetes secret that holds them")
    return problems
