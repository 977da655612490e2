"""A text encoder alone, out of any folder or repository that holds one.

``google-t5/t5-11b`` is one PyTorch file of 45 GB with the decoder in it, which every process reads.
Its encoder in safetensors has 19 GB in float32, or half of it in bfloat16, and loads lazily:

    python -m cosmos_posttrain.text --source google-t5/t5-11b --target t5-11b --dtype bfloat16

Flows in: a path that ``load_text_encoder`` takes. Flows out: a folder that it takes too, with the
same hash. ``config.json`` is written last: a folder without it is not complete.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_posttrain import files
from cosmos_posttrain.cli import parse
from cosmos_posttrain.errors import OutputFolderError, SaveError
from cosmos_posttrain.text.config import FLAGS, TextEncoderConversionConfig, validate

if TYPE_CHECKING:
    from cosmos_posttrain.text.loading import EncoderSource

_OURS = re.compile(
    r"config\.json|tokenizer\.json|tokenizer_config\.json"
    r"|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


# What describes a decoder, or the weights that were read.
_NOT_KEPT = ("dtype", "quantization_config", "num_decoder_layers", "task_specific_params")


def convert_text_encoder(config: TextEncoderConversionConfig) -> str:
    """Writes the encoder of ``source``.

    Returns:
        Its hash.

    Raises:
        ConfigError: a setting is missing or unknown.
        OutputFolderError: the target holds something else, or a conversion already.
        TextError: the source cannot be read.
        SaveError: the disk is full, say.
    """
    validate(config)
    target = Path(config.target)
    _check_target(target, config.overwrite)

    from cosmos_posttrain import launch
    from cosmos_posttrain.text import weights_io
    from cosmos_posttrain.text.loading import open_source

    source = open_source(config.source)
    dtype = launch.parse_dtype(config.dtype) or source.readers[weights_io.EMBEDDING]().dtype
    if target.exists() and source.folder.resolve() == target.resolve():
        raise OutputFolderError(f"the source and the target are {target}; name another target.")
    with files.locked(target):
        for path in target.iterdir():
            if path.name != files.LOCK_FILE:
                files.remove(path)
        try:
            return write_encoder(target, source, dtype)
        except OSError as error:
            raise SaveError(
                f"{target} cannot be written ({error.strerror or error}); make room or name "
                "another --target, then give the same command again."
            ) from error


def _check_target(target: Path, overwrite: bool) -> None:
    files.check_writable(target, "the target")
    foreign = files.foreign_names(target, lambda name: _OURS.fullmatch(name) is not None)
    if foreign:
        raise OutputFolderError(
            f"the target {target} holds something else ({foreign[0]}); name a new or empty folder."
        )
    if (target / "config.json").exists() and not overwrite:
        raise OutputFolderError(
            f"the target {target} holds a text encoder already; name another, or add --overwrite."
        )


def write_encoder(folder: Path, source: EncoderSource, dtype: Any) -> str:
    """Writes weights, tokenizer and config of a source into an empty folder; returns its hash.

    Args:
        folder: that exists.
        source: what to write.
        dtype: of the tensors, a ``torch.dtype``.

    Raises:
        TextError: a tensor is damaged.
        OutputFolderError: there is too little room.
    """
    import torch

    from cosmos_posttrain.text import weights_io

    num_bytes = sum(shape.numel() for shape in source.shapes.values()) * dtype.itemsize
    files.check_free_space(folder, num_bytes, "the text encoder")
    parts = weights_io.plan_parts(source.shapes, dtype)
    digests: dict[str, str] = {}
    for file, names in parts.items():
        shapes = {name: source.shapes[name] for name in names}
        weights = weights_io.read_weights(
            source.readers, shapes, dtype, torch.device("cpu"), source.folder
        )
        weights_io.write_part(folder / file, weights.tensors)
        digests |= weights.digests
    weights_io.write_index(folder, parts, num_bytes)
    name = str(dtype).removeprefix("torch.")
    write_description(folder, source.config, source.tokenizer.to_json(), name)
    return weights_io.encoder_sha256(digests)


def write_description(folder: Path, config: dict[str, Any], tokenizer: str, dtype: str) -> None:
    """Writes ``tokenizer.json``, and what tells transformers what the folder holds.

    Args:
        folder: that exists.
        config: the encoder's ``config.json``, or that of a whole T5.
        tokenizer: the contents of ``tokenizer.json``.
        dtype: of the tensors, such as ``float32``.
    """
    files.write_text(folder / "tokenizer.json", tokenizer)
    tokens = {item["id"]: item["content"] for item in json.loads(tokenizer)["added_tokens"]}
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.get("n_positions", 512),
        "eos_token": tokens.get(config.get("eos_token_id", 1), "</s>"),
        "pad_token": tokens.get(config.get("pad_token_id", 0), "<pad>"),
        "unk_token": "<unk>",
    }
    files.write_json(folder / "tokenizer_config.json", description)
    own = {"architectures": ["T5EncoderModel"], "torch_dtype": dtype, "is_encoder_decoder": False}
    kept = {key: value for key, value in config.items() if key not in _NOT_KEPT}
    files.write_json(folder / "config.json", kept | own)


def main() -> None:
    """Parses the command line and converts."""
    description = "Writes a T5 encoder without its decoder, in safetensors."
    config = parse(
        TextEncoderConversionConfig, FLAGS, None, "python -m cosmos_posttrain.text", description
    )
    sha256 = convert_text_encoder(config)
    print(f"wrote {config.target}: the text encoder {sha256[:12]} of {config.source}.")
