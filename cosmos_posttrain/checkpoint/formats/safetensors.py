"""``safetensors``: one file or shards with an index, and ``config.json``; with a model card.

The names are the public reference implementation's, and so are the fields of ``config.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from cosmos_posttrain.checkpoint import infer_config
from cosmos_posttrain.checkpoint.formats.base import Contents, WritableFormat
from cosmos_posttrain.files import write_json, write_text
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.reference_config import to_reference

if TYPE_CHECKING:
    from cosmos_posttrain.checkpoint.weights import ReferenceWeights

SINGLE, INDEX, CONFIG, CARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "config.json",
    "README.md",
)

_CARD_TEXT = """---
library_name: {library}
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
{more}"""


class SafetensorsFormat(WritableFormat):
    """``model.safetensors`` or its shards, with ``config.json``.

    Attributes:
        library: what the model card says that reads it.
    """

    library: ClassVar[str] = "cosmos_posttrain"

    name = "safetensors"
    title = "safetensors with config.json"
    parts: ClassVar[tuple[str, ...]] = (
        "model*.safetensors",
        "model*.safetensors.index.json",
        CONFIG,
    )
    hub_files: ClassVar[tuple[str, ...]] = ("model*.safetensors", INDEX, CONFIG)
    is_sharded = True

    def detect(self, folder: Path) -> Path | None:
        return folder if any((folder / name).is_file() for name in (SINGLE, INDEX)) else None

    def config(self, checkpoint: Path, named: ModelConfig | None) -> ModelConfig:
        return named or infer_config.config_beside(checkpoint, "safetensors")

    def files(self, checkpoint: Path) -> list[Path]:
        from cosmos_posttrain.checkpoint import safetensors_file

        return [*safetensors_file.files(checkpoint), checkpoint / CONFIG]

    def open(self, checkpoint: Path, config: ModelConfig) -> ReferenceWeights:
        from cosmos_posttrain.checkpoint.safetensors_file import SafetensorsReader
        from cosmos_posttrain.checkpoint.weights import ReferenceWeights

        reader = SafetensorsReader(checkpoint)
        return ReferenceWeights(reader.read, reader.shapes, reader.dtypes, config, str(checkpoint))

    def write(self, folder: Path, contents: Contents) -> None:
        from cosmos_posttrain.checkpoint.safetensors_file import SafetensorsWriter

        tensors = contents.weights.tensors()
        writer = SafetensorsWriter(folder, tensors, contents.max_shard_bytes)
        try:
            for name, tensor in contents.weights.reference():
                writer.add(name, tensor)
            writer.finish()
        finally:
            writer.close()
        write_json(folder / CONFIG, self.config_json(contents.config))
        num_files = len(list(folder.glob("*.safetensors")))
        text = _CARD_TEXT.format(
            library=self.library,
            num_files=num_files,
            source=contents.source_name,
            rows="\n".join(f"| {name} | {value} |" for name, value in _rows(contents).items()),
            more=self.usage(contents.config),
        )
        write_text(folder / CARD, text)

    def config_json(self, config: ModelConfig) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return to_reference(config)

    def usage(self, config: ModelConfig) -> str:
        """What the model card says of other ways to use it."""
        return ""


def _rows(contents: Contents) -> dict[str, object]:
    """The model card's table."""
    config = contents.config
    values: dict[str, object] = {
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
    if contents.data is not None and contents.data.contract is not None:
        values["tokenizer"] = contents.data.contract.tokenizer.id
    return values
