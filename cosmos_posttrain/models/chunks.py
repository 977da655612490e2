"""Parts of a model that lie on one pipeline rank without being next to each other, as one module.

Flows in: the parts, first layers first, wrapped for training or not. Flows out: one module with the
parameters of all. Under an interleaved pipeline (Narayanan et al., 2021, arXiv:2104.04473, section
2.2) rank r of P holds the parts r, P + r, 2 P + r, ...; each is a ``CosmosGPTModel`` of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from cosmos_posttrain.models.config import ModelConfig


class ModelChunks(nn.Module):
    """Several parts of one model.

    Args:
        chunks: at least two.
    """

    def __init__(self, chunks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.chunks = nn.ModuleList(chunks)

    @property
    def module(self) -> ModelChunks:
        """The parts as they are inside of what wraps them for training."""
        return ModelChunks([chunk.module for chunk in chunks_of(self)])

    @property
    def model_config(self) -> ModelConfig:
        """The whole model's numbers."""
        config: ModelConfig = chunks_of(self)[0].model_config
        return config

    @property
    def config(self) -> Any:
        """Megatron's config of the first part; only their layers differ."""
        return chunks_of(self)[0].config


def chunks_of(model: nn.Module) -> list[Any]:
    """The parts of a model on this rank, in order; one, unless the pipeline is interleaved."""
    return list(model.chunks) if isinstance(model, ModelChunks) else [model]
