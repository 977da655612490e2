"""The classes of NeMo and Lightning that ours are made from, or empty ones where they are missing.

So the files beside this one can be imported anywhere; what is made from empty ones is never used.
"""

from __future__ import annotations

from typing import Any

from cosmos_posttrain.nemo.extra import is_installed


def _empty(name: str) -> Any:
    return type(name, (), {})


if is_installed():
    from lightning.fabric.plugins.environments import ClusterEnvironment
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from lightning.pytorch.loggers import TensorBoardLogger
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer
    from nemo.lightning.io.mixin import IOMixin
    from nemo.lightning.megatron_parallel import MegatronLossReduction
    from nemo.lightning.nemo_logger import NeMoLogger
    from nemo.lightning.pytorch.callbacks import ModelCheckpoint
    from nemo.lightning.pytorch.optim import MegatronOptimizerModule
else:
    Callback, LightningDataModule, LightningModule = map(_empty, ("Callback", "Data", "Module"))
    IOMixin, MegatronLossReduction = map(_empty, ("IOMixin", "LossReduction"))
    McoreDistributedOptimizer, MegatronOptimizerModule = map(_empty, ("Optimizer", "OptModule"))
    ModelCheckpoint, ClusterEnvironment = map(_empty, ("ModelCheckpoint", "Environment"))
    NeMoLogger, TensorBoardLogger = map(_empty, ("NeMoLogger", "TensorBoardLogger"))

__all__ = [
    "Callback",
    "ClusterEnvironment",
    "IOMixin",
    "LightningDataModule",
    "LightningModule",
    "McoreDistributedOptimizer",
    "MegatronLossReduction",
    "MegatronOptimizerModule",
    "ModelCheckpoint",
    "NeMoLogger",
    "TensorBoardLogger",
]
