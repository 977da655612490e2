"""The published sizes by name, and two for the CPU. No torch, no Megatron.

Flows in: a size's name. Flows out: a ``ModelConfig``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig, YarnConfig

_COSMOS: dict[str, Any] = {
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "ffn_hidden_size": 14336,
    "vocab_size": 64000,
    "latent_shape": LatentShape(5, 40, 64),
}

_YARN = YarnConfig(original_latent_shape=LatentShape(3, 40, 64))
_TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 192,
    "num_attention_heads": 8,
    "num_query_groups": 2,
    "kv_channels": 24,
    "ffn_hidden_size": 512,
    "vocab_size": 1000,
    "latent_shape": LatentShape(5, 12, 20),
    "params_dtype": "float32",
}
_TEXT: dict[str, Any] = {"context_dim": 1024, "context_len": 512}

# The published sizes (Cosmos World Foundation Model Platform, section 5.2), and two for the CPU.
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(**_TINY),
    "tiny-video2world": ModelConfig(**_TINY, context_dim=64, context_len=32),
    "4B": ModelConfig(num_layers=16, hidden_size=4096, **_COSMOS),
    "12B": ModelConfig(num_layers=40, hidden_size=5120, yarn=_YARN, **_COSMOS),
    "5B-Video2World": ModelConfig(num_layers=16, hidden_size=4096, **_COSMOS, **_TEXT),
    "13B-Video2World": ModelConfig(num_layers=40, hidden_size=5120, yarn=_YARN, **_COSMOS, **_TEXT),
}


def preset(
    name: str, vocab_size: int | None = None, latent_shape: LatentShape | None = None
) -> ModelConfig:
    """A published size by name, at another vocabulary and grid where given.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in PRESETS:
        raise ConfigError(f"there is no model size {name!r}; use one of {', '.join(PRESETS)}.")
    config = PRESETS[name]
    return dataclasses.replace(
        config,
        vocab_size=vocab_size or config.vocab_size,
        latent_shape=latent_shape or config.latent_shape,
    )
