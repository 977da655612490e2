"""Post-training of Cosmos-1.0-Autoregressive-4B with NeMo-Run.

Flows in: where the data is, and how many machines and GPUs. Flows out: a ``run.Partial``.
"""

from __future__ import annotations

from cosmos_models import Model

MODEL = Model(
    "cosmos_4b",
    {1: "train_4b_1gpu.yaml", 2: "train_4b_2gpu.yaml", 8: "train_4b.yaml"},
)

finetune_recipe = MODEL.factory()
