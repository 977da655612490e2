"""Post-training of Cosmos-1.0-Autoregressive-5B-Video2World with NeMo-Run.

Flows in: where the data is, and how many machines and GPUs. Flows out: a ``run.Partial``.
"""

from __future__ import annotations

from cosmos_models import Model

MODEL = Model(
    "cosmos_5b_video2world",
    {8: "train_5b_video2world.yaml"},
    takes_text=True,
)

finetune_recipe = MODEL.factory()
