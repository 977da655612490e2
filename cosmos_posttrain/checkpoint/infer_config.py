"""A model's numbers from the shapes of its Megatron tensors and whatever else is known.

Flows in: shapes under Megatron's names on disk, numbers from a foreign context, or a config that
the user names. Flows out: a ``ModelConfig``. Shapes tell everything but the token grid, the RoPE's
base, the epsilon, YaRN, and how many rows only pad the vocabulary; those come from the context, or
from the published model whose shapes are the same. A folder's name never counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.config import NUM_SPECIAL_TOKENS, ModelConfig
from cosmos_posttrain.models.presets import PRESETS
from cosmos_posttrain.models.reference_config import from_reference, to_reference

Shapes = Mapping[str, tuple[int, ...]]

_LAYER = "decoder.layers."
_CORE = ("n_layers", "dim", "n_heads", "n_kv_heads", "head_dim", "ffn_hidden_size")
_NEEDED = (*_CORE, "vocab_size", "video_latent_shape", "rope_theta", "norm_eps")
_YARN = ("original_latent_shape", "yarn_scale", "yarn_beta_fast", "yarn_beta_slow")


def named_config(name: str) -> ModelConfig:
    """The config that ``--model_config`` names: a ``config.json``, its folder, or a size.

    Raises:
        CheckpointError: neither a file nor a size.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    return read_reference_config(path / "config.json" if path.is_dir() else path)


def config_beside(folder: Path, what: str) -> ModelConfig:
    """The ``config.json`` that lies beside weights of a form that does not say its numbers.

    Args:
        folder: where the weights lie.
        what: what they are, for the message.

    Raises:
        CheckpointError: see ``read_reference_config``.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} has {what} but no config.json; copy the one that belongs to it there, or "
            "give --model_config."
        )
    return read_reference_config(folder / "config.json")


def read_reference_config(path: Path) -> ModelConfig:
    """Reads a ``config.json`` in the reference's field names.

    Raises:
        CheckpointError: missing, not JSON, or of another kind of model.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{path} does not exist; give a config.json in the reference's field names, or a size "
            f"({', '.join(PRESETS)})."
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download it again.")
    return from_reference(values)


def from_shapes(shapes: Shapes, known: dict[str, Any], where: str) -> ModelConfig:
    """Puts shapes and known numbers together.

    Args:
        shapes: of all Megatron tensors, layers of one kind stacked (``decoder.layers.mlp...``).
        known: numbers in the reference's field names; they win over everything else.
        where: the source, for messages.

    Raises:
        CheckpointError: tensors are missing that tell the sizes, or numbers that nothing tells.
    """
    measured = _measure(shapes, where)
    rows = measured.pop("vocab_size")
    known = _with_vocab_size(known, rows, measured["insert_cross_attn"])
    values: dict[str, Any] = {}
    for config in PRESETS.values():
        reference = to_reference(config)
        same = all(reference.get(key) == measured[key] for key in (*_CORE, "insert_cross_attn"))
        # With another vocabulary it is another model, on a grid of its own, unless it says more.
        if same and ("vocab_size" in known or _pads_to(config.vocab_size, rows)):
            values = reference | {"vocab_size_in": None}
    values = {key: value for key, value in values.items() if value is not None}
    values = {"vocab_size": rows} | values | measured | known
    missing = [key for key in _NEEDED if values.get(key) is None]
    if values.get("apply_yarn"):
        missing += [key for key in _YARN if values.get(key) is None]
    if missing:
        raise CheckpointError(
            f"{where} does not say its {', '.join(missing)}, and its shapes are those of no "
            "published model; give --model_config with a config.json or a size."
        )
    return from_reference(values)


def _with_vocab_size(known: dict[str, Any], rows: int, has_text: bool) -> dict[str, Any]:
    """Adds the vocabulary where only the embedding's rows are known.

    A Video2World model's embedding has rows for special tokens, which its output layer has not. Not
    every writer counts them in; the output layer's own rows tell, unless they are padded.
    """
    embedding_rows = known.get("vocab_size_in")
    if "vocab_size" in known or not isinstance(embedding_rows, int):
        return known
    special = NUM_SPECIAL_TOKENS if has_text else 0
    vocab_size = embedding_rows if embedding_rows == rows else embedding_rows - special
    return {**known, "vocab_size": vocab_size, "vocab_size_in": vocab_size + special}


def _pads_to(vocab_size: int, rows: int) -> bool:
    """Whether ``rows`` can be ``vocab_size`` with Megatron's padding (128 x TP at most 8)."""
    return vocab_size <= rows < vocab_size + 1024 and rows % 64 == 0


def _measure(shapes: Shapes, where: str) -> dict[str, Any]:
    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise CheckpointError(
                f"{where} lacks {name}; it is not a Cosmos autoregressive model, or not complete."
            )
        return shapes[name]

    width = shape(f"{_LAYER}self_attention.q_layernorm.weight")[-1]
    packed = shape(f"{_LAYER}self_attention.linear_qkv.weight")
    heads = shape(f"{_LAYER}self_attention.linear_proj.weight")[-1] // width
    values = {
        "n_layers": packed[0],
        "dim": packed[-1],
        "n_heads": heads,
        "n_kv_heads": (packed[-2] // width - heads) // 2,
        "head_dim": width,
        "ffn_hidden_size": shape(f"{_LAYER}mlp.linear_fc2.weight")[-1],
        "vocab_size": shape("output_layer.weight")[0],
        "insert_cross_attn": False,
        "apply_abs_pos_emb": False,
    }
    cross = shapes.get(f"{_LAYER}cross_attention.linear_kv.weight")
    if cross is not None:
        values |= {"insert_cross_attn": True, "apply_abs_pos_emb": True, "context_dim": cross[-1]}
    return values
