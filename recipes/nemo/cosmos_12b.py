"""Post-training of Cosmos-1.0-Autoregressive-12B with NeMo-Run.

Flows in: where the data is, and how many machines and GPUs. Flows out: a ``run.Partial``.
"""

from __future__ import annotations

import nemo_run as run
from cosmos_models import Model

from cosmos_posttrain.nemo.recipe import finetune

MODEL = Model(
    "cosmos_12b",
    {8: "train_12b.yaml", 16: "train_12b_16gpu.yaml", 64: "train_12b_64gpu.yaml"},
)


@run.cli.factory(target=finetune, name=MODEL.name)
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
    return MODEL.recipe(data_path, dir, name, num_nodes, num_gpus_per_node)
