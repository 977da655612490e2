"""Which reference tensors make up which Megatron tensor.

Flows in: a way to fetch reference tensors (``model.layers.0.attention.wq.weight`` ...) or whole
Megatron tensors by name. Flows out: the other form, one tensor at a time. Megatron names here are
the ones on disk (fused norms named as Transformer Engine does), with global layer numbers.

Packing: ``linear_qkv`` holds, for every query group, its queries, then its key, then its value;
``linear_kv`` (cross-attention) its key, then its value; ``linear_fc1`` holds w1, then w3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.config import ModelConfig

Fetch = Callable[[str], Tensor]

# Medusa heads, where a checkpoint of this package has them; every rank has all of them.
MEDUSA = "medusa_heads."
_PLAIN = {
    "embedding.word_embeddings.weight": "tok_embeddings.weight",
    "decoder.final_layernorm.weight": "norm.weight",
    "output_layer.weight": "output.weight",
}
# What a layer is made of, in the order of the forward pass.
_IN_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": ("attention_norm",),
    "self_attention.linear_qkv.weight": ("attention.wq", "attention.wk", "attention.wv"),
    "self_attention.q_layernorm.weight": ("attention.q_norm",),
    "self_attention.k_layernorm.weight": ("attention.k_norm",),
    "self_attention.linear_proj.weight": ("attention.wo",),
    "mlp.linear_fc1.layer_norm_weight": ("ffn_norm",),
    "mlp.linear_fc1.weight": ("feed_forward.w1", "feed_forward.w3"),
    "mlp.linear_fc2.weight": ("feed_forward.w2",),
}
_TEXT_IN_LAYER = {
    "pre_cross_attn_layernorm.weight": ("cross_attention_norm",),
    "cross_attention.linear_q.weight": ("cross_attention.wq",),
    "cross_attention.q_layernorm.weight": ("cross_attention.q_norm",),
    "cross_attention.linear_kv.weight": ("cross_attention.wk", "cross_attention.wv"),
    "cross_attention.k_layernorm.weight": ("cross_attention.k_norm",),
    "cross_attention.linear_proj.weight": ("cross_attention.wo",),
}
_QKV = "self_attention.linear_qkv.weight"
_KV = "cross_attention.linear_kv.weight"
_FC1 = "mlp.linear_fc1.weight"
_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


def megatron_names(config: ModelConfig) -> list[str]:
    """Names of all Megatron tensors of a model, in the order of the forward pass."""
    in_layer = list(_IN_LAYER)
    if config.is_video2world:
        first_of_mlp = in_layer.index("mlp.linear_fc1.layer_norm_weight")
        in_layer[first_of_mlp:first_of_mlp] = _TEXT_IN_LAYER
    layers = [f"decoder.layers.{n}.{name}" for n in range(config.num_layers) for name in in_layer]
    first, *last = _PLAIN
    heads = [f"medusa_heads.{number}.weight" for number in range(config.num_medusa_heads)]
    return [first, *layers, *last, *heads]


def reference_names(config: ModelConfig) -> list[str]:
    """Names of all tensors in a reference ``model.pt``."""
    return [source for name in megatron_names(config) for source in reference_sources(name)]


def reference_sources(name: str) -> list[str]:
    """The reference tensors that one Megatron tensor is made of."""
    if name in _PLAIN:
        return [f"model.{_PLAIN[name]}"]
    if name.startswith(MEDUSA):  # not the reference's, but named as if they were
        return [f"model.{name}"]
    match = _LAYER.fullmatch(name)
    assert match is not None, name
    parts = (_IN_LAYER | _TEXT_IN_LAYER)[match[2]]
    return [f"model.layers.{match[1]}.{part}.weight" for part in parts]


def reference_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a reference ``model.pt``."""
    hidden, width = config.hidden_size, config.kv_channels
    queries, keys = config.num_attention_heads * width, config.num_query_groups * width
    by_suffix: dict[str, tuple[int, ...]] = {
        "wq": (queries, hidden),
        "wk": (keys, hidden),
        "wv": (keys, hidden),
        "wo": (hidden, queries),
        "q_norm": (width,),
        "k_norm": (width,),
        "w1": (config.ffn_hidden_size, hidden),
        "w2": (hidden, config.ffn_hidden_size),
        "w3": (config.ffn_hidden_size, hidden),
        "tok_embeddings": (config.input_vocab_size, hidden),
        "output": (config.vocab_size, hidden),
    }
    if config.context_dim is not None:
        by_suffix |= {f"cross_attention.{n}": (keys, config.context_dim) for n in ("wk", "wv")}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in reference_names(config):
        *_, module, part, _weight = name.split(".")
        if module == "medusa_heads":
            shapes[name] = (hidden, hidden)
            continue
        shapes[name] = by_suffix.get(f"{module}.{part}", by_suffix.get(part, (hidden,)))
    return shapes


def to_megatron(name: str, fetch: Fetch, config: ModelConfig) -> Tensor:
    """Makes one whole (unsharded) Megatron tensor out of reference tensors.

    Args:
        name: the Megatron name.
        fetch: returns a reference tensor by name.
        config: the model's numbers.
    """
    parts = [fetch(source) for source in reference_sources(name)]
    if name.endswith((_QKV, _KV)):
        groups = [part.unflatten(0, (config.num_query_groups, -1)) for part in parts]
        return torch.cat(groups, dim=1).flatten(0, 1)
    if name.endswith(_FC1):
        return torch.cat(parts)
    (tensor,) = parts
    if name in (_EMBEDDING, _OUTPUT):
        rows = config.padded_vocab_size if name == _OUTPUT else config.padded_input_vocab_size
        surplus = rows - tensor.shape[0]
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
    if name.endswith((_QKV, _KV)):
        sizes = [config.kv_channels, config.kv_channels]
        if name.endswith(_QKV):
            sizes.insert(
                0, config.num_attention_heads // config.num_query_groups * config.kv_channels
            )
        grouped = tensor.unflatten(0, (config.num_query_groups, -1))
        parts = [part.flatten(0, 1) for part in grouped.split(sizes, dim=1)]
    elif name.endswith(_FC1):
        parts = list(tensor.chunk(2))
    elif name == _EMBEDDING:
        parts = [tensor[: config.input_vocab_size]]
    elif name == _OUTPUT:
        parts = [tensor[: config.vocab_size]]
    else:
        parts = [tensor]
    return dict(zip(sources, parts, strict=True))


def shard(name: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    """This tensor-parallel rank's part of a whole Megatron tensor."""
    if (
        size == 1
        or name.startswith(MEDUSA)
        or "norm" in name.rsplit(".", 2)[-2]
        or "layer_norm" in name
    ):
        return tensor
    if name.endswith(_FC1):
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    dim = 1 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
    return tensor.chunk(size, dim=dim)[rank]


def check_reference_shapes(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, where: str
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
