"""The classes of NeMo and Lightning that ours are made from, or empty ones where they are missing.

So the files beside this one can be imported anywhere; what is made from empty ones is never used.
"""

from __future__ import annotations

from typing import Any

from cosmos_posttrain.nemo.extra import is_installed


def _empty(name: str) -> Any:
    return type(name, (), {})


if is_installed():
    from lightning.pytorch import Callback, LightningDataModule, LightningModule
    from nemo.lightning.io.mixin import IOMixin
    from nemo.lightning.megatron_parallel import MegatronLossReduction
    from nemo.lightning.pytorch.optim import MegatronOptimizerModule
    from nemo.lightning.pytorch.optim.base import LRSchedulerModule
else:
    Callback, LightningDataModule, LightningModule = map(_empty, ("Callback", "Data", "Module"))
    IOMixin, MegatronLossReduction = map(_empty, ("IOMixin", "LossReduction"))
    MegatronOptimizerModule, LRSchedulerModule = map(_empty, ("OptimizerModule", "LRScheduler"))

__all__ = [
    "Callback",
    "IOMixin",
    "LRSchedulerModule",
    "LightningDataModule",
    "LightningModule",
    "MegatronLossReduction",
    "MegatronOptimizerModule",
]
