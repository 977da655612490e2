"""The training scripts' command line: a run, and what a dry run of it assumes. No torch.

Flows in: defaults < YAML < flags < overrides (``cli.py``). Flows out: a ``TrainCommand``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.nemo import limits
from cosmos_posttrain.plan.config import GPU_MEMORY_GB, MAX_GPUS, MAX_GPUS_PER_NODE
from cosmos_posttrain.training import config as training
from cosmos_posttrain.training.config import TrainConfig

ENGINES = DIRECT, NEMO = ("direct", "nemo")


@dataclass
class TrainCommand(TrainConfig):
    """A run, or a look at what it would do.

    Attributes:
        engine: what drives the run: ``direct`` (Megatron-Core alone), or ``nemo`` (NeMo 2's
            trainer, where that is installed); the run folder is the same, either goes on with it.
        dry_run: say what the run would do, and why it would not; nothing is written or downloaded,
            no weights are read and no GPU is needed.
        num_gpus: of a dry run, the GPUs (processes) of the run; None means the processes that were
            started.
        gpus_per_node: of a dry run, GPUs of one machine.
        gpu: of a dry run, the kind of GPU: A100, H100, H200, B200, or any with ``gpu_memory_gb``.
        gpu_memory_gb: of a dry run, memory of one GPU in GiB; None means the usual one of ``gpu``.
    """

    engine: str = setting("direct", choices=ENGINES)
    dry_run: bool = False
    num_gpus: int | None = setting(None, at_least=1, at_most=MAX_GPUS)
    gpus_per_node: int = setting(8, at_least=1, at_most=MAX_GPUS_PER_NODE)
    gpu: str = "H100"
    gpu_memory_gb: float | None = setting(None, above=0)

    @property
    def run_config(self) -> TrainConfig:
        """The run's own settings, which it records."""
        names = [field.name for field in dataclasses.fields(TrainConfig)]
        return TrainConfig(**{name: getattr(self, name) for name in names})


FLAGS = (
    *training.FLAGS,
    Flag("--engine"),
    Flag("--dry_run"),
    Flag("--num_gpus"),
    Flag("--gpus_per_node"),
    Flag("--gpu"),
    Flag("--gpu_memory_gb"),
)


def validate(command: TrainCommand) -> None:
    """Lists what is wrong with the assumptions of a dry run, or with some where there is none.

    And what the engine cannot do.

    Raises:
        ConfigError: one sentence with all of it.
    """
    problems = limits.problems(command) if command.engine == NEMO else []
    if not command.dry_run:
        usual = TrainCommand()
        names = ("num_gpus", "gpus_per_node", "gpu", "gpu_memory_gb")
        changed = [name for name in names if getattr(command, name) != getattr(usual, name)]
        problems += [f"--{name} has no effect without --dry_run" for name in changed]
    elif command.gpu_memory_gb is None and command.gpu not in GPU_MEMORY_GB:
        problems.append(f"the memory of --gpu {command.gpu} is not known: give --gpu_memory_gb")
    check(command, flag_names(FLAGS), problems)
