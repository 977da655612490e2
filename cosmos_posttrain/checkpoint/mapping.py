"""Which reference tensors make up which Megatron tensor.

Flows in: a way to fetch reference tensors (``model.layers.0.attention.wq.weight`` ...) or whole
Megatron tensors by name. Flows out: the other form, one tensor at a time. Megatron names here are
the ones on disk (fused norms named as Transformer Engine does), with global layer numbers.

Packing: ``linear_qkv`` holds, for every query group, its queries, then its key, then its value;
``linear_fc1`` holds w1, then w3.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.config import ModelConfig

Fetch = Callable[[str], Tensor]

_PLAIN = {
    "embedding.word_embeddings.weight": "tok_embeddings.weight",
    "decoder.final_layernorm.weight": "norm.weight",
    "output_layer.weight": "output.weight",
}
_PLAIN_IN_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "attention_norm.weight",
    "self_attention.q_layernorm.weight": "attention.q_norm.weight",
    "self_attention.k_layernorm.weight": "attention.k_norm.weight",
    "self_attention.linear_proj.weight": "attention.wo.weight",
    "mlp.linear_fc1.layer_norm_weight": "ffn_norm.weight",
    "mlp.linear_fc2.weight": "feed_forward.w2.weight",
}
_QKV = "self_attention.linear_qkv.weight"
_FC1 = "mlp.linear_fc1.weight"
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def megatron_names(config: ModelConfig) -> list[str]:
    """Names of all Megatron tensors of a model, in the order of the forward pass."""
    in_layer = [*list(_PLAIN_IN_LAYER)[:1], _QKV, *list(_PLAIN_IN_LAYER)[1:5], _FC1]
    in_layer.append(list(_PLAIN_IN_LAYER)[5])
    layers = [f"decoder.layers.{n}.{name}" for n in range(config.num_layers) for name in in_layer]
    first, *last = _PLAIN
    return [first, *layers, *last]


def reference_names(config: ModelConfig) -> list[str]:
    """Names of all tensors in a reference ``model.pt``."""
    return [source for name in megatron_names(config) for source in reference_sources(name)]


def reference_sources(name: str) -> list[str]:
    """The reference tensors that one Megatron tensor is made of."""
    if name in _PLAIN:
        return [f"model.{_PLAIN[name]}"]
    match = _LAYER.fullmatch(name)
    assert match is not None, name
    prefix, name = f"model.layers.{match[1]}.", match[2]
    if name == _QKV:
        return [f"{prefix}attention.{part}.weight" for part in ("wq", "wk", "wv")]
    if name == _FC1:
        return [f"{prefix}feed_forward.{part}.weight" for part in ("w1", "w3")]
    return [f"{prefix}{_PLAIN_IN_LAYER[name]}"]


def reference_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a reference ``model.pt``."""
    hidden, width = config.hidden_size, config.kv_channels
    queries, keys = config.num_attention_heads * width, config.num_query_groups * width
    by_suffix: dict[str, tuple[int, ...]] = {
        "wq.weight": (queries, hidden),
        "wk.weight": (keys, hidden),
        "wv.weight": (keys, hidden),
        "wo.weight": (hidden, queries),
        "q_norm.weight": (width,),
        "k_norm.weight": (width,),
        "w1.weight": (config.ffn_hidden_size, hidden),
        "w2.weight": (hidden, config.ffn_hidden_size),
        "w3.weight": (config.ffn_hidden_size, hidden),
        "tok_embeddings.weight": (config.vocab_size, hidden),
        "output.weight": (config.vocab_size, hidden),
    }
    return {
        name: by_suffix.get(".".join(name.split(".")[-2:]), (hidden,))
        for name in reference_names(config)
    }


def to_megatron(name: str, fetch: Fetch, config: ModelConfig) -> Tensor:
    """Makes one whole (unsharded) Megatron tensor out of reference tensors.

    Args:
        name: the Megatron name.
        fetch: returns a reference tensor by name.
        config: the model's numbers.
    """
    parts = [fetch(source) for source in reference_sources(name)]
    if name.endswith(_QKV):
        groups = [part.unflatten(0, (config.num_query_groups, -1)) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if name.endswith(_FC1):
        return torch.cat(parts)
    (tensor,) = parts
    if name in _VOCABULARY:
        surplus = config.padded_vocab_size - tensor.shape[0]
        return torch.nn.functional.pad(tensor, (0, 0, 0, surplus)) if surplus else tensor
    return tensor


def to_reference(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Splits one whole Megatron tensor into the reference tensors that it is made of.

    Args:
        name: the Megatron name.
        tensor: the whole tensor.
        config: the model's numbers.
    """
    sources = reference_sources(name)
    if name.endswith(_QKV):
        per_group = config.num_attention_heads // config.num_query_groups
        sizes = [per_group * config.kv_channels, config.kv_channels, config.kv_channels]
        grouped = tensor.unflatten(0, (config.num_query_groups, -1))
        parts = [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]
    elif name.endswith(_FC1):
        parts = list(tensor.chunk(2))
    elif name in _VOCABULARY:
        parts = [tensor[: config.vocab_size]]
    else:
        parts = [tensor]
    return dict(zip(sources, parts, strict=True))


def shard(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    """This tensor-parallel rank's part of a whole Megatron tensor."""
    if size == 1 or "norm" in name.rsplit(".", 2)[-2] or "layer_norm" in name:
        return tensor
    if name.endswith(_FC1):
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    dim = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
    return tensor.chunk(size, dim=dim)[rank]


def check_reference_shapes(
    shapes: dict[str, tuple[int, ...]], config: ModelConfig, where: str
) -> None:
    """Compares the tensors of a ``model.pt`` with what its config asks for.

    Raises:
        CheckpointError: one sentence that names missing, surplus and misshapen tensors.
    """
    wanted = reference_shapes(config)
    problems = []
    for title, names in (
        ("lacks", [n for n in wanted if n not in shapes]),
        ("has surplus", [n for n in shapes if n not in wanted]),
    ):
        if names:
            problems.append(f"{title} {', '.join(names)}")
    problems += [
        f"has {name} of shape {shapes[name]} instead of {shape}"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit its config.json: it {'; '.join(problems)}.")
