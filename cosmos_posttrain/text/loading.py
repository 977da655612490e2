"""From a path or a name to a ready text encoder.

Flows in: ``tiny``, a folder, or a Hugging Face id (``owner/name``, also with ``@revision``). Flows
out: a :class:`TextEncoder`.

The network is transformers' ``T5EncoderModel``; its config, weights and tokenizer are read here, so
that nothing of a folder is ever run as code, no tensor stays random for want of a file, and the
hash is taken on the way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cosmos_posttrain import hub, launch
from cosmos_posttrain.errors import ConfigError, TextError
from cosmos_posttrain.files import read_json
from cosmos_posttrain.text import weights_io
from cosmos_posttrain.text.packages import package
from cosmos_posttrain.text.prompts import PromptTokenizer, read_tokenizer
from cosmos_posttrain.text.shipped import SHIPPED, TEXT_ENCODER_DTYPES
from cosmos_posttrain.text.text_encoder import TextEncoder

CONFIG_FILE = "config.json"
# T5's own; a config.json that says nothing else means this.
DEFAULT_CONTEXT_LEN = 512

_COMMON_FILES = ("*.json", "spiece.model")
_SAFETENSORS = ("model.safetensors", "model-*.safetensors")
_PICKLES = ("pytorch_model.bin", "pytorch_model-*.bin")


def load_text_encoder(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
) -> TextEncoder:
    """Loads a T5 encoder and its tokenizer.

    Args:
        path: ``tiny`` (shipped, with random weights), a folder with ``config.json``, a tokenizer
            and weights (``model.safetensors`` or ``pytorch_model.bin``, whole or in parts, with or
            without a decoder), or a Hugging Face id ``owner/name[@revision]``.
        device: see :func:`cosmos_posttrain.launch.device`.
        dtype: to compute in, bfloat16 or float32; None means the file's own on a GPU (float32
            where that is float16) and float32 on the CPU.

    Raises:
        TextError: it cannot be loaded, or is no T5 encoder.
        ConfigError: another dtype, or no such device.
    """
    computed, target, source = _open(path, device, dtype)
    weights = weights_io.read_weights(
        source.readers, source.shapes, computed, target, source.folder
    )
    model = source.model
    model.load_state_dict(weights.tensors, strict=False, assign=True)
    model.encoder.embed_tokens.weight = model.shared.weight
    return TextEncoder(
        model.eval().requires_grad_(False),
        source.tokenizer,
        source.id,
        weights_io.encoder_sha256(weights.digests),
        model.config.d_model,
        source.context_len,
    )


@dataclass(frozen=True)
class TextEncoderIdentity:
    """What there is to know of an encoder without its weights; see ``TextEncoder``."""

    id: str
    sha256: str
    width: int
    context_len: int
    dtype: torch.dtype
    device: torch.device


def identify_text_encoder(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    known: Mapping[str, str] | None = None,
) -> TextEncoderIdentity:
    """What ``load_text_encoder`` would load, with little memory: a tensor at a time is read.

    Args:
        path: see ``load_text_encoder``.
        device: likewise.
        dtype: likewise.
        known: hashes by id; where the id names a commit, so that it cannot come to mean other
            weights, its hash is taken from here and nothing is read.

    Raises:
        TextError: see ``load_text_encoder``.
        ConfigError: likewise.
    """
    wanted, target, source = _open(path, device, dtype)
    sha256 = (known or {}).get(source.id)
    if sha256 is None or re.search("@[0-9a-f]{40}$", source.id) is None:
        nowhere = torch.device("meta")
        weights = weights_io.read_weights(
            source.readers, source.shapes, torch.bfloat16, nowhere, source.folder
        )
        sha256 = weights_io.encoder_sha256(weights.digests)
    width = int(source.model.config.d_model)
    return TextEncoderIdentity(source.id, sha256, width, source.context_len, wanted, target)


def _open(
    path: str | Path, device: str | torch.device, dtype: torch.dtype | str | None
) -> tuple[torch.dtype, torch.device, EncoderSource]:
    """The dtype to compute in, where, and the encoder that was found."""
    wanted = launch.parse_dtype(dtype)
    if wanted is torch.float16:
        raise ConfigError(
            "the text encoder's dtype is float16, in which T5 overflows; use one of "
            f"{', '.join(TEXT_ENCODER_DTYPES)}."
        )
    target = launch.device(device)
    source = open_source(path)
    own = source.readers[weights_io.EMBEDDING]().dtype
    return computed_dtype(wanted, own, target), target, source


def computed_dtype(
    wanted: torch.dtype | None, own: torch.dtype, device: torch.device
) -> torch.dtype:
    """The dtype to compute in, of weights that are stored as ``own``."""
    if wanted is not None:
        return wanted
    return torch.float32 if device.type == "cpu" or own == torch.float16 else own


@dataclass(frozen=True)
class EncoderSource:
    """An encoder that was found and checked, but not read yet.

    Attributes:
        folder: where its files are.
        id: the path or name as it was given, with the commit where that is known.
        config: its ``config.json``.
        model: the network without weights, on the meta device.
        shapes: of its tensors, by canonical name.
        readers: of its tensors, by canonical name.
        tokenizer: its tokenizer.
        context_len: most tokens of a prompt.
    """

    folder: Path
    id: str
    config: dict[str, Any]
    model: Any
    shapes: dict[str, torch.Size]
    readers: dict[str, weights_io.Reader]
    tokenizer: PromptTokenizer
    context_len: int


def open_source(path: str | Path) -> EncoderSource:
    """Finds an encoder's files and checks that they belong together; see ``load_text_encoder``.

    Raises:
        TextError: something is missing, damaged, or of another kind of model.
    """
    folder = _resolve(str(path))
    config_path = folder / CONFIG_FILE
    config = read_json(config_path, TextError, "give the folder of a T5 encoder")
    if config.get("model_type") != "t5":
        raise TextError(
            f"{config_path} describes a {config.get('model_type', 'nameless')} model; prompts are "
            "encoded by T5: give the folder of a T5 encoder."
        )
    context_len = _whole_number(config, "n_positions", DEFAULT_CONTEXT_LEN, config_path)
    end_token = _whole_number(config, "eos_token_id", 1, config_path)
    readers = weights_io.open_tensors(folder)
    tokenizer = read_tokenizer(folder, context_len, end_token)
    model = _network(config, config_path)
    shapes = {
        key: tensor.shape
        for name, tensor in model.state_dict().items()
        if (key := weights_io.canonical(name))
    }
    weights_io.check_names(readers, shapes, folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise TextError(
            f"{folder} holds a tokenizer of {tokenizer.vocab_size} tokens for an encoder of "
            f"{model.config.vocab_size}; put the encoder's own tokenizer there."
        )
    identity = _identity(str(path), folder)
    return EncoderSource(folder, identity, config, model, shapes, readers, tokenizer, context_len)


def _whole_number(config: dict[str, Any], key: str, default: int, path: Path) -> int:
    value = config.get(key, default)
    if not isinstance(value, int) or value < 1:
        raise TextError(f"{path} is damaged: its {key} is {value!r}, not a number from 1 up.")
    return value


def _network(config: dict[str, Any], path: Path) -> Any:
    """The network of a config, on the meta device."""
    transformers = package("transformers")
    try:
        values = {key: value for key, value in config.items() if key != "quantization_config"}
        with torch.device("meta"):
            return transformers.T5EncoderModel(transformers.T5Config(**values))
    except Exception as error:  # transformers checks its configs in ways that differ by version
        first_line = str(error).strip().partition("\n")[0]
        raise TextError(
            f"{path} describes no T5 encoder that transformers can build ({first_line}); copy or "
            "download it again."
        ) from error


def _resolve(name: str) -> Path:
    """A local folder for any accepted spelling."""
    if name in SHIPPED:
        return Path(__file__).parent / "weights" / name
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise TextError(f"{name} is a file; give the folder of a T5 encoder.")
    if not hub.looks_like_hub_id(name):
        raise TextError(
            f"{name} does not exist; give a folder, a Hugging Face id such as google-t5/t5-11b, or "
            f"{SHIPPED[0]}."
        )
    folder = hub.resolve(name, allow_patterns=(*_COMMON_FILES, *_SAFETENSORS))
    if not weights_io.has_weights(folder, weights_io.SAFETENSORS_FILES):
        folder = hub.resolve(name, allow_patterns=(*_COMMON_FILES, *_PICKLES))
    return folder


def _identity(name: str, folder: Path) -> str:
    """The name that a manifest records: as given, with the commit that a hub id stands for."""
    if hub.looks_like_hub_id(name) and re.fullmatch("[0-9a-f]{40}", folder.name):
        return f"{hub.split_revision(name)[0]}@{folder.name}"
    return name
