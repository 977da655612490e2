"""``--engine nemo``: a run by NeMo 2's trainer.

Flows in: a ``TrainConfig``. Flows out: a run folder, as ``training.trainer.train`` writes it.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from cosmos_posttrain.nemo import extra
from cosmos_posttrain.training.config import TrainConfig


def train(config: TrainConfig, takes_text: bool = False) -> Path:
    """Runs a post-training job (or goes on with one) and returns its last checkpoint.

    Args:
        config: the run's.
        takes_text: train a Video2World model on data with prompts; else a base model.

    Raises:
        ConfigError: NeMo is not installed; and see ``training.trainer.train``.
    """
    extra.check()
    from cosmos_posttrain.nemo.trainer import NemoTrainer

    with contextlib.closing(NemoTrainer(config, takes_text)) as trainer:
        return trainer.fit()
