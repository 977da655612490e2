"""What the recipes of this folder have in common: a shipped config becomes a NeMo-Run recipe.

Flows in: a model's name, and how many machines and GPUs. Flows out: a ``run.Partial`` with the
values of ``configs/train_*.yaml``, whose comments say why they are as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nemo_run as run

from cosmos_posttrain.config import merge
from cosmos_posttrain.nemo.recipe import finetune, make_recipe
from cosmos_posttrain.training.config import TrainConfig

# NeMo's loop waits for its checkpoints and for the updated weights.
NOT_BY_NEMO = (("async_save", False), ("parallel.overlap_param_gather", False))
CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"


@dataclass(frozen=True)
class Model:
    """A model that recipes exist for.

    Attributes:
        name: of its recipe.
        configs: files in ``configs/``, by the number of GPUs from which on each is meant.
        takes_text: whether it is a Video2World model.
    """

    name: str
    configs: dict[int, str]
    takes_text: bool = False

    def config_file(self, num_gpus: int) -> Path:
        """The shipped config for so many GPUs: the largest one's, else the smallest there is."""
        fitting = [number for number in self.configs if number <= num_gpus]
        return CONFIG_DIR / self.configs[max(fitting, default=min(self.configs))]

    def factory(self) -> Callable[..., run.Partial]:
        """The model's ``finetune_recipe``, which NeMo-Run knows by the model's name."""

        @run.cli.factory(target=finetune, name=self.name)
        def finetune_recipe(
            data_path: str = "",
            dir: str | None = None,
            name: str = "default",
            num_nodes: int = 1,
            num_gpus_per_node: int = 8,
        ) -> run.Partial:
            """A run on prepared data; ``recipe.config`` holds all settings of training.

            Args:
                data_path: folder that prepare_dataset.py wrote.
                dir: folder of runs; None means nemo_experiments.
                name: of the run, and of its folder in ``dir``.
                num_nodes: machines.
                num_gpus_per_node: GPUs, and processes, of each.

            Raises:
                ConfigError: the model's parallel sizes do not fit the number of GPUs.
            """
            log_dir = str(Path(dir or "nemo_experiments") / name)
            config = merge(
                TrainConfig,
                self.config_file(num_nodes * num_gpus_per_node),
                [("data.path", data_path), ("log_dir", log_dir), *NOT_BY_NEMO],
            )
            return make_recipe(config, self.takes_text, num_nodes, num_gpus_per_node)

        return finetune_recipe
