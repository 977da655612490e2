"""A run as a NeMo-Run recipe: its settings as fields, and what its processes call.

Flows in: a ``TrainConfig``. Flows out: a ``run.Partial``, which NeMo-Run hands to any executor;
and, in the processes that one starts, the run that ``--engine nemo`` makes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from cosmos_posttrain import launch
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.nemo import limits
from cosmos_posttrain.training.config import TrainConfig

# What starts a recipe in each process, wherever NeMo-Run is installed.
RUNNER = "nemo_run.core.runners.fdl_runner"


def finetune(
    config: TrainConfig,
    takes_text: bool = False,
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
) -> None:
    """Post-trains a model and ends the process; called in every process of a run.

    Args:
        config: the run's.
        takes_text: train a Video2World model on data with prompts; else a base model.
        num_nodes: machines that the recipe was made for.
        num_gpus_per_node: processes of each.
    """
    launch.run_cli(lambda: _finetune(config, takes_text, num_nodes * num_gpus_per_node))


def _finetune(config: TrainConfig, takes_text: bool, num_processes: int) -> None:
    from cosmos_posttrain.nemo.engine import train

    _check(config)
    if launch.world_size() != num_processes:
        raise ConfigError(
            f"the recipe is made for {num_processes} processes, but {launch.world_size()} were "
            "started; give finetune_recipe and the executor the same numbers."
        )
    train(config, takes_text)


def make_recipe(
    config: TrainConfig, takes_text: bool, num_nodes: int, num_gpus_per_node: int
) -> Any:
    """The ``run.Partial`` of a run.

    Args:
        config: the run's; each of its settings can be changed in the recipe.
        takes_text: see ``finetune``, as the next two.
        num_nodes: see there.
        num_gpus_per_node: see there.

    Raises:
        ConfigError: NeMo-Run is not installed, the parallel sizes do not fit the processes, or a
            setting is none of this engine's.
    """
    run = nemo_run_module()
    _check(config)
    num_processes = math.prod((num_nodes, num_gpus_per_node))
    if misfit := config.parallel.misfit(num_processes):
        raise ConfigError(
            f"{misfit}, but num_nodes x num_gpus_per_node makes {num_processes}; give other "
            "numbers."
        )
    return run.Partial(
        finetune,
        config=_fields(run, config),
        takes_text=takes_text,
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
    )


def _check(config: TrainConfig) -> None:
    if problems := limits.problems(config):
        raise ConfigError("; ".join(problems) + ".")


def _fields(run: Any, value: Any) -> Any:
    """A dataclass, and those in it, as configs of NeMo-Run's."""
    if not dataclasses.is_dataclass(value):
        return value
    names = [item.name for item in dataclasses.fields(value)]
    return run.Config(type(value), **{name: _fields(run, getattr(value, name)) for name in names})


def command(recipe: Any, name: str) -> list[str]:
    """What each process calls, behind its interpreter: the whole recipe stands in the words.

    Args:
        recipe: what ``make_recipe`` made.
        name: of the job.
    """
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    return ["-m", RUNNER, "-n", name, ZlibJSONSerializer().serialize(recipe)]


def nemo_run_module() -> Any:
    """NeMo-Run.

    Raises:
        ConfigError: it is not installed; says what to do.
    """
    try:
        import nemo_run
    except ImportError as error:
        raise ConfigError(
            f"NeMo-Run cannot be imported ({error}); run make nemo-env, or pip install '.[launch]' "
            "where a recipe is only handed over."
        ) from error
    return nemo_run
