"""What a Cosmos autoregressive model is, in plain numbers. No torch, no Megatron.

Flows in: a size name, a reference ``config.json`` or a checkpoint's ``context``. Flows out: a
``ModelConfig``, and the same thing back as JSON.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from cosmos_posttrain.errors import CheckpointError, ConfigError
from cosmos_posttrain.geometry import LatentShape, parse_latent_shape

# Embedding and output rows are padded to a multiple of this, whatever the tensor parallel size, so
# that a checkpoint's shapes do not depend on the layout that wrote it. 64000 and 64064 need none.
VOCAB_SIZE_MULTIPLE = 64


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (Peng et al., 2023, arXiv:2309.00071), applied to each axis of the 3D RoPE.

    Attributes:
        original_latent_shape: the grid (T, H, W) that the model was trained on before.
        scale: by how much the low frequencies are slowed down.
        beta_fast: rotations over the original length above which a frequency stays as it is.
        beta_slow: rotations below which it is slowed down fully.
    """

    original_latent_shape: LatentShape
    scale: float = 2.0
    beta_fast: float = 4.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A Cosmos autoregressive model (Llama-3 style, 3D RoPE), in Megatron's terms.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the hidden states.
        num_attention_heads: query heads.
        num_query_groups: key/value heads (grouped-query attention).
        kv_channels: width of one head.
        ffn_hidden_size: width of the SwiGLU's two branches.
        vocab_size: tokens that can be predicted (rows of the output layer).
        latent_shape: the token grid (T, H, W) of one clip; positions are taken from it.
        rotary_base: theta of the RoPE.
        layernorm_epsilon: epsilon of every RMSNorm.
        yarn: YaRN settings, or None.
        params_dtype: dtype of the stored weights, ``bfloat16`` or ``float32``.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    latent_shape: LatentShape
    rotary_base: float = 500000.0
    layernorm_epsilon: float = 1e-5
    yarn: YarnConfig | None = None
    params_dtype: str = "bfloat16"

    @property
    def seq_length(self) -> int:
        """Tokens of one clip, T * H * W."""
        return self.latent_shape.num_tokens

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the output layer."""
        return -(-self.vocab_size // VOCAB_SIZE_MULTIPLE) * VOCAB_SIZE_MULTIPLE

    @property
    def num_parameters(self) -> int:
        """Parameters, without the rows that only pad the vocabulary."""
        queries = self.num_attention_heads * self.kv_channels
        keys = self.num_query_groups * self.kv_channels
        attention = self.hidden_size * (2 * queries + 2 * keys) + 2 * self.kv_channels
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        return self.num_layers * layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size

    def check_tensor_parallel(self, size: int) -> None:
        """Refuses a tensor parallel size that does not divide the model.

        Raises:
            ConfigError: lists every number that it does not divide, and the sizes that fit.
        """
        names = ("num_attention_heads", "num_query_groups", "ffn_hidden_size", "padded_vocab_size")
        wrong = [name for name in names if size < 1 or getattr(self, name) % size]
        if wrong:
            fitting = [
                n
                for n in range(1, self.num_query_groups + 1)
                if all(getattr(self, name) % n == 0 for name in names)
            ]
            raise ConfigError(
                f"--tensor_model_parallel_size {size} does not divide "
                + ", ".join(f"{name} {getattr(self, name)}" for name in wrong)
                + f"; use one of {', '.join(map(str, fitting))}."
            )

    def check_pipeline_parallel(self, size: int) -> None:
        """Refuses a pipeline parallel size that does not divide the layers.

        Raises:
            ConfigError: names the number of layers.
        """
        if size < 1 or self.num_layers % size:
            raise ConfigError(
                f"--pipeline_model_parallel_size {size} does not divide the model's "
                f"{self.num_layers} layers; use a divisor of {self.num_layers}."
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint's ``context/model.json``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelConfig:
        """Reads what ``to_json`` wrote.

        Raises:
            CheckpointError: unknown or missing keys.
        """
        values = dict(values)
        try:
            values["latent_shape"] = parse_latent_shape(values["latent_shape"])
            if values.get("yarn") is not None:
                yarn = dict(values["yarn"])
                yarn["original_latent_shape"] = parse_latent_shape(yarn["original_latent_shape"])
                values["yarn"] = YarnConfig(**yarn)
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the model config is not one of ours: {error}.") from error


# Fields of the reference's config.json, and ours.
_REFERENCE_NAMES = {
    "n_layers": "num_layers",
    "dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "ffn_hidden_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
    "rope_theta": "rotary_base",
    "norm_eps": "layernorm_epsilon",
}


def from_reference(values: dict[str, Any]) -> ModelConfig:
    """Reads the public reference implementation's ``config.json``.

    Raises:
        CheckpointError: a missing field, or a model that this package cannot build.
    """
    missing = [k for k in (*_REFERENCE_NAMES, "video_latent_shape") if values.get(k) is None]
    if missing:
        raise CheckpointError(f"the model's config.json lacks {', '.join(missing)}.")
    if values.get("insert_cross_attn") or values.get("apply_abs_pos_emb"):
        raise CheckpointError(
            "this is a Video2World model (insert_cross_attn is set); this version builds the base "
            "models (4B, 12B) only."
        )
    if values.get("rope_dim", "3D") != "3D" or not values.get("use_qk_normalization", True):
        raise CheckpointError(
            "the model's config.json asks for a RoPE other than 3D or for no q/k normalisation; "
            "only Cosmos autoregressive models can be built."
        )
    yarn = None
    if values.get("apply_yarn"):
        yarn = YarnConfig(
            original_latent_shape=parse_latent_shape(values["original_latent_shape"]),
            scale=float(values["yarn_scale"]),
            beta_fast=float(values["yarn_beta_fast"]),
            beta_slow=float(values["yarn_beta_slow"]),
        )
    fields: dict[str, Any] = {ours: values[theirs] for theirs, ours in _REFERENCE_NAMES.items()}
    return ModelConfig(
        **fields,
        latent_shape=parse_latent_shape(values["video_latent_shape"]),
        yarn=yarn,
        params_dtype=str(values.get("precision", "bfloat16")),
    )


def to_reference(config: ModelConfig) -> dict[str, Any]:
    """Writes a config in the field names of the public reference implementation."""
    values: dict[str, Any] = {
        theirs: getattr(config, ours) for theirs, ours in _REFERENCE_NAMES.items()
    }
    values |= {
        "vocab_size_in": config.vocab_size,
        "video_latent_shape": list(config.latent_shape),
        "max_seq_len": config.seq_length,
        "max_batch_size": 1,
        "precision": config.params_dtype,
        "use_qk_normalization": True,
        "norm_type": "rmsnorm",
        "rope_dim": "3D",
        "pytorch_rope_version": "v2",
        "original_seq_len": 8192,
        "insert_cross_attn": False,
        "apply_abs_pos_emb": False,
        "pad_to_multiple_of": None,
        "training_type": "video_to_video",
        "apply_yarn": config.yarn is not None,
    }
    if config.yarn is not None:
        values |= {
            "original_latent_shape": list(config.yarn.original_latent_shape),
            "yarn_scale": config.yarn.scale,
            "yarn_beta_fast": config.yarn.beta_fast,
            "yarn_beta_slow": config.yarn.beta_slow,
        }
    return values


_COSMOS: dict[str, Any] = {
    "num_attention_heads": 32,
    "num_query_groups": 8,
    "kv_channels": 128,
    "ffn_hidden_size": 14336,
    "vocab_size": 64000,
    "latent_shape": LatentShape(5, 40, 64),
}

# The published sizes (Cosmos World Foundation Model Platform, section 5.2), and one for the CPU.
PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        num_layers=4,
        hidden_size=192,
        num_attention_heads=8,
        num_query_groups=2,
        kv_channels=24,
        ffn_hidden_size=512,
        vocab_size=1000,
        latent_shape=LatentShape(5, 12, 20),
        params_dtype="float32",
    ),
    "4B": ModelConfig(num_layers=16, hidden_size=4096, **_COSMOS),
    "12B": ModelConfig(
        num_layers=40,
        hidden_size=5120,
        yarn=YarnConfig(original_latent_shape=LatentShape(3, 40, 64)),
        **_COSMOS,
    ),
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
