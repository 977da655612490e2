"""Post-training of Cosmos-1.0-Autoregressive-12B with NeMo-Run.

Flows in: where the data is, and how many machines and GPUs. Flows out: a ``run.Partial``.
"""

from __future__ import annotations

from cosmos_models import Model

MODEL = Model(
    "cosmos_12b",
    {8: "train_12b.yaml", 16: "train_12b_16gpu.yaml", 64: "train_12b_64gpu.yaml"},
)

finetune_recipe = MODEL.factory()
