"""What the recipes of this folder have in common: a shipped config becomes a NeMo-Run recipe.

Flows in: a model's name, and how many machines and GPUs. Flows out: a ``run.Partial`` with the
values of ``configs/train_*.yaml``, whose comments say why they are as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain.config import merge
from cosmos_posttrain.nemo.recipe import make_recipe
from cosmos_posttrain.training.config import TrainConfig

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

    def recipe(
        self, data_path: str, dir: str | None, name: str, num_nodes: int, num_gpus_per_node: int
    ) -> Any:
        """See ``finetune_recipe`` of the models' files."""
        log_dir = str(Path(dir or "nemo_experiments") / name)
        config = merge(
            TrainConfig,
            self.config_file(num_nodes * num_gpus_per_node),
            [("data.path", data_path), ("log_dir", log_dir), ("async_save", False)],
        )
        return make_recipe(config, self.takes_text, num_nodes, num_gpus_per_node)
