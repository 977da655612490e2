"""From a path or a name to a ready tokenizer.

Flows in: a shipped name, a native folder, a folder or file of TorchScript, or a Hugging Face id.
Flows out: a :class:`VideoTokenizer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.geometry import Compression, parse_compression
from cosmos_posttrain.tokenizer import SHIPPED
from cosmos_posttrain.tokenizer.native import NativeBackend, load_native
from cosmos_posttrain.tokenizer.torchscript import ScriptDecoder, ScriptEncoder
from cosmos_posttrain.tokenizer.video_tokenizer import VideoTokenizer
from cosmos_posttrain.tokenizer.weights_io import CONFIG_FILE, WEIGHTS_FILE

_HUB_FILES = ("encoder.jit", "decoder.jit", CONFIG_FILE, WEIGHTS_FILE)


def load_tokenizer(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    compression: str | Sequence[int] | None = None,
) -> VideoTokenizer:
    """Loads a tokenizer, encoder and decoder.

    Args:
        path: ``tiny-dv4x8x8``, ``tiny-dv8x8x8``, ``tiny-dv8x16x16``, ``tiny`` (the one of
            ``compression``), a folder with ``config.json`` and ``model.safetensors``, a folder
            with ``encoder.jit`` and ``decoder.jit``, one of these files, or a Hugging Face id.
        device: ``auto`` is CUDA where there is one, else the CPU.
        dtype: to compute in; None means the checkpoint's own on a GPU and float32 on the CPU.
        compression: the compression that the tokenizer must have; None takes any.

    Raises:
        TokenizerError: if it cannot be loaded or has another compression.
    """
    return load_tokenizer_pair(path, path, compression, device, dtype)


def load_tokenizer_pair(
    encoder_path: str | Path,
    decoder_path: str | Path,
    compression: str | Sequence[int] | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
) -> VideoTokenizer:
    """Loads the encoder from one path and the decoder from another; see :func:`load_tokenizer`.

    Raises:
        TokenizerError: if one cannot be loaded, or they are not of the same rate and levels.
    """
    wanted = None if compression is None else parse_compression(compression)
    device = _pick_device(device)
    dtype = _pick_dtype(dtype)
    encoder = _load_half(encoder_path, "encoder", wanted, device, dtype)
    if isinstance(encoder, NativeBackend) and str(encoder_path) == str(decoder_path):
        decoder: NativeBackend | ScriptDecoder = encoder
    else:
        other = _load_half(decoder_path, "decoder", wanted, device, dtype)
        assert not isinstance(other, ScriptEncoder)
        decoder = other
    assert not isinstance(encoder, ScriptDecoder)
    tokenizer = VideoTokenizer(encoder, decoder, _identity(encoder_path, wanted), device)
    if wanted is not None and tokenizer.compression != wanted:
        raise TokenizerError(
            f"{encoder_path} compresses by {tokenizer.compression.name}, but "
            f"{wanted.name} was asked for; give its own tokenizer_compression_factor "
            f"({tokenizer.compression}) or another tokenizer."
        )
    return tokenizer


def _pick_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
    except RuntimeError as error:
        raise TokenizerError(f"{device!r} is not a device; use auto, cpu or cuda.") from error
    if picked.type == "cuda" and not torch.cuda.is_available():
        raise TokenizerError(f"device {device} was asked for, but CUDA is absent; use cpu.")
    return picked


def _pick_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        picked = getattr(torch, dtype, None)
        if not isinstance(picked, torch.dtype):
            raise TokenizerError(f"{dtype!r} is not a dtype; use float32, bfloat16 or float16.")
        dtype = picked
    if dtype is not None and not dtype.is_floating_point:
        raise TokenizerError(f"{dtype} is not a float dtype; use float32, bfloat16 or float16.")
    return dtype


def _identity(path: str | Path, compression: Compression | None) -> str:
    """The name that a manifest records: as given, with ``tiny`` made specific."""
    if str(path) == "tiny" and compression is not None:
        return SHIPPED[compression]
    return str(path)


def _resolve(path: str | Path, compression: Compression | None) -> Path:
    """A local file or folder for any accepted spelling."""
    name = str(path)
    if name == "tiny":
        if compression is None:
            raise TokenizerError(
                "tokenizer 'tiny' needs a compression factor; give "
                "--tokenizer_compression_factor, or one of " + ", ".join(SHIPPED.values()) + "."
            )
        if compression not in SHIPPED:
            raise TokenizerError(
                f"there is no tiny tokenizer of {compression.name}; use one of "
                + ", ".join(Compression(*key).name for key in SHIPPED)
                + "."
            )
        name = SHIPPED[compression]
    if name in SHIPPED.values():
        return Path(__file__).parent / "weights" / name
    if Path(name).exists():
        return Path(name)
    from cosmos_posttrain import hub

    if not hub.looks_like_hub_id(name):
        raise TokenizerError(
            f"{name} does not exist; give a folder, a .jit file, a Hugging Face id, or one of "
            + ", ".join(SHIPPED.values())
            + "."
        )
    return hub.resolve(name, allow_patterns=_HUB_FILES)


def _load_half(
    path: str | Path,
    role: str,
    compression: Compression | None,
    device: torch.device,
    dtype: torch.dtype | None,
) -> NativeBackend | ScriptEncoder | ScriptDecoder:
    """Loads ``role``, ``encoder`` or ``decoder``, from any accepted spelling."""
    local = _resolve(path, compression)
    if local.is_dir() and (local / CONFIG_FILE).is_file() and (local / WEIGHTS_FILE).is_file():
        return load_native(local, device, dtype)
    if local.is_dir():
        script = local / f"{role}.jit"
        if not script.is_file():
            raise TokenizerError(
                f"{path} holds neither {CONFIG_FILE} and {WEIGHTS_FILE} nor {script.name}; "
                "give a tokenizer's folder."
            )
    elif local.suffix == ".jit":
        other = "decoder" if role == "encoder" else "encoder"
        script = local.with_name(local.name.replace(other, role))
    elif local.name in (CONFIG_FILE, WEIGHTS_FILE):
        return load_native(local.parent, device, dtype)
    else:
        raise TokenizerError(
            f"{path} is not a tokenizer; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, "
            "or a .jit file."
        )
    half = ScriptEncoder if role == "encoder" else ScriptDecoder
    return half(script, device, dtype)
