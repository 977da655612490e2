"""The forms that a conversion can write, and the comparison with what it was made from.

Flows in: opened weights and an empty folder. Flows out: one of

- ``pt``: ``model.pt`` and ``config.json``, as the public reference implementation reads them;
- ``megatron``: ``weights/`` (torch_dist) and ``context/``, as training writes them;
- ``nemo``: the same, with NeMo 2's own context files on top;
- ``safetensors``: shards with an index, ``config.json`` and a model card.

One tensor group (the parts of one Megatron tensor of one layer) is in memory at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cosmos_posttrain import files
from cosmos_posttrain.checkpoint import context, mapping, nemo_context, plain, safetensors_file
from cosmos_posttrain.checkpoint.pt_file import PtWriter
from cosmos_posttrain.checkpoint.source import Source
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.reference_config import to_reference

_CARD = """---
library_name: cosmos_posttrain
tags: [cosmos, video, world-model, autoregressive]
license: other
---

# Cosmos autoregressive model

Weights under the names of the public reference implementation, in {num_files} safetensors
file(s); converted from `{source}`. The licence is that of the model they were made from.

| | |
|---|---|
{rows}

    from cosmos_posttrain import load_model
    model = load_model("path/of/this/folder")
"""


def num_bytes(weights: plain.Weights) -> int:
    """Bytes of all tensors."""
    return sum(safetensors_file.num_bytes(*entry) for entry in weights.tensors().values())


def write(
    source: Source,
    weights: plain.Weights,
    target_format: str,
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Writes everything but the conversion's marker into an existing empty folder.

    Raises:
        CheckpointError: the source is damaged, or mixes dtypes where Megatron has one tensor.
    """
    tensors = weights.tensors()
    dtype = next(iter(tensors.values()))[1]
    # What the weights really have; a config.json may say something else.
    config = dataclasses.replace(source.config, params_dtype=str(dtype).removeprefix("torch."))
    if target_format in ("megatron", "nemo"):
        plain.check_stackable(tensors, config)
        (folder / "weights").mkdir()
        plain.write_megatron(folder / "weights", config, _megatron(weights, config))
        context.write_context(folder, config, source.data)
        if target_format == "nemo":
            nemo_context.write(folder, config)
        return
    writer: PtWriter | safetensors_file.SafetensorsWriter
    if target_format == "pt":
        writer = PtWriter(folder / "model.pt", tensors)
    else:
        writer = safetensors_file.SafetensorsWriter(folder, tensors, max_shard_bytes)
    try:
        for name, tensor in weights.reference():
            writer.add(name, tensor)
        writer.finish()
    finally:
        writer.close()
    files.write_json(folder / "config.json", to_reference(config))
    if target_format == "safetensors":
        (folder / "README.md").write_text(_card(source, config, folder), encoding="utf-8")


def _megatron(weights: plain.Weights, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    for name in mapping.megatron_names(config):
        yield name, weights.megatron(name)


def _card(source: Source, config: ModelConfig, folder: Path) -> str:
    assert source.path is not None
    values = {
        "parameters": f"{config.num_parameters:,}",
        "dtype": config.params_dtype,
        **{
            name: getattr(config, name)
            for name in ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups")
        },
        "ffn_hidden_size": config.ffn_hidden_size,
        "vocabulary": config.vocab_size,
        "latent_shape (T, H, W)": tuple(config.latent_shape),
    }
    if config.is_video2world:
        values["context (T5 rows, width)"] = (config.context_len, config.context_dim)
    contract = source.contract
    if contract is not None and isinstance(contract.get("tokenizer"), dict):
        values["tokenizer"] = contract["tokenizer"].get("id")
    return _CARD.format(
        num_files=len(list(folder.glob("*.safetensors"))),
        source=source.path.name,
        rows="\n".join(f"| {name} | {value} |" for name, value in values.items()),
    )


def verify(weights: plain.Weights, written: Source) -> None:
    """Reads everything back and compares it bit by bit.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    pairs = zip(weights.reference(), plain.read_reference(written), strict=True)
    for (name, before), (name_after, after) in pairs:
        assert name == name_after
        # As bytes: NaN must equal itself.
        same = before.dtype == after.dtype and before.shape == after.shape
        if not same or not torch.equal(_as_bytes(before), _as_bytes(after)):
            raise CheckpointError(
                f"{name} differs after writing; check the disk and convert again, with --overwrite "
                "where the target is there."
            )


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
