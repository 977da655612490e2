"""The public reference implementation's ``config.json``, read and written. No torch, no Megatron.

Flows in: its fields. Flows out: a ``ModelConfig``, and the same thing back in those field names.
"""

from __future__ import annotations

from typing import Any

from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.geometry import parse_latent_shape
from cosmos_posttrain.models.config import (
    SEQ_LENGTH_MULTIPLE,
    UNSCALED,
    AxisScale,
    ModelConfig,
    YarnConfig,
)

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


_YARN_NAMES = ("original_latent_shape", "yarn_scale", "yarn_beta_fast", "yarn_beta_slow")


def from_reference(values: dict[str, Any]) -> ModelConfig:
    """Reads the public reference implementation's ``config.json``.

    Raises:
        CheckpointError: a missing field, or a model that this package cannot build.
        ConfigError: numbers that no model can have.
        GeometryError: a token grid that is none.
    """
    needed = (*_REFERENCE_NAMES, "video_latent_shape")
    needed += _YARN_NAMES if values.get("apply_yarn") else ()
    missing = [name for name in needed if values.get(name) is None]
    if missing:
        raise CheckpointError(f"the model's config.json lacks {', '.join(missing)}.")
    _check_architecture(values)
    try:
        config = _read_numbers(values)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the model's config.json holds a value of another kind than it should ({error}); "
            "correct it."
        ) from error
    rows = values.get("vocab_size_in", config.input_vocab_size)
    if rows != config.input_vocab_size:
        raise CheckpointError(
            f"the model's config.json says vocab_size_in {rows} for vocab_size "
            f"{config.vocab_size}, but such a model has {config.input_vocab_size} embedding rows; "
            "correct it."
        )
    return config


def _read_numbers(values: dict[str, Any]) -> ModelConfig:
    fields: dict[str, Any] = {ours: values[theirs] for theirs, ours in _REFERENCE_NAMES.items()}
    if values.get("apply_yarn"):
        scale, fast, slow = (float(values[name]) for name in _YARN_NAMES[1:])
        original = parse_latent_shape(values["original_latent_shape"])
        fields["yarn"] = YarnConfig(original, scale, fast, slow)
    if values.get("insert_cross_attn"):
        fields["context_dim"] = values["context_dim"]
        fields["context_len"] = values.get("context_len", ModelConfig.context_len)
    return ModelConfig(
        **fields,
        latent_shape=parse_latent_shape(values["video_latent_shape"]),
        params_dtype=values.get("precision") or ModelConfig.params_dtype,
        position_scale=AxisScale(*values.get("position_scale", UNSCALED)),
    )


def _check_architecture(values: dict[str, Any]) -> None:
    """Refuses a ``config.json`` that asks for what no Cosmos model has."""
    text = bool(values.get("insert_cross_attn"))
    problem = None
    if values.get("rope_dim", "3D") != "3D":
        problem = f"a RoPE of kind {values['rope_dim']}, not 3D"
    elif not values.get("use_qk_normalization", True):
        problem = "no q/k normalisation"
    elif text != bool(values.get("apply_abs_pos_emb")):
        problem = "only one of insert_cross_attn and apply_abs_pos_emb (Video2World has both)"
    elif text and not values.get("context_dim"):
        problem = "cross-attention without a context_dim"
    elif text and values.get("insert_cross_attn_every_k_layers", 1) != 1:
        problem = "cross-attention in some layers only"
    elif text and values.get("pad_to_multiple_of") not in (None, SEQ_LENGTH_MULTIPLE):
        problem = f"sequences padded to a multiple of {values['pad_to_multiple_of']}, not 64"
    if problem is not None:
        raise CheckpointError(
            f"the model's config.json asks for {problem}; only Cosmos autoregressive models can be "
            "built."
        )


def to_reference(config: ModelConfig) -> dict[str, Any]:
    """Writes a config in the field names of the public reference implementation."""
    values: dict[str, Any] = {
        theirs: getattr(config, ours) for theirs, ours in _REFERENCE_NAMES.items()
    }
    values |= {
        "vocab_size_in": config.input_vocab_size,
        "video_latent_shape": list(config.latent_shape),
        "max_seq_len": config.seq_length,
        "max_batch_size": 1,
        "precision": config.params_dtype,
        "use_qk_normalization": True,
        "norm_type": "rmsnorm",
        "rope_dim": "3D",
        "pytorch_rope_version": "v2",
        "original_seq_len": 8192,
        "insert_cross_attn": config.is_video2world,
        "apply_abs_pos_emb": config.is_video2world,
        "pad_to_multiple_of": SEQ_LENGTH_MULTIPLE if config.is_video2world else None,
        "training_type": "text_to_video" if config.is_video2world else "video_to_video",
        "apply_yarn": config.yarn is not None,
    }
    if config.yarn is not None:
        values |= {
            "original_latent_shape": list(config.yarn.original_latent_shape),
            "yarn_scale": config.yarn.scale,
            "yarn_beta_fast": config.yarn.beta_fast,
            "yarn_beta_slow": config.yarn.beta_slow,
        }
    if config.is_video2world:
        values |= {"context_dim": config.context_dim, "context_len": config.context_len}
    if config.position_scale != UNSCALED:
        # Ours alone: the reference implementation has no position interpolation.
        values["position_scale"] = list(config.position_scale)
    return values
