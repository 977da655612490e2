"""Reading and writing tokenizer weights as ``config.json`` + ``model.safetensors``.

Flows in: a folder, or a network. Flows out: a state dict that fits the network, the hash that
identifies an encoder, or a folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.files import replacing, write_json
from cosmos_posttrain.tokenizer.network import DVConfig, DVNetwork

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


def parameters_only(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops what is not learned: wavelet filters, codebooks and level tables in old checkpoints."""
    return {name: tensor for name, tensor in tensors.items() if name.endswith((".weight", ".bias"))}


def encoder_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Identifies an encoder by its learned tensors (names and values as float32).

    Files of other forms (safetensors, TorchScript) with the same weights give the same hash.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters_only(tensors).items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_sha256(path: Path | str, found: str, expected: str | None) -> None:
    """Refuses an encoder with other weights than are expected; None expects nothing.

    Raises:
        TokenizerError: names both hashes.
    """
    if expected is not None and found != expected:
        raise TokenizerError(
            f"{path} has other weights (sha256 {found[:12]}) than are expected of it (sha256 "
            f"{expected[:12]}); give the tokenizer that has those with --encoder_path."
        )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a safetensors file.

    Raises:
        TokenizerError: if it is missing or corrupt.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise TokenizerError(f"{path} does not exist; a tokenizer folder needs it.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise TokenizerError(
            f"{path} is not a readable safetensors file ({error}); copy or download it again."
        ) from error


def describes_network(config: Path) -> bool:
    """Whether a ``config.json`` is that of a native tokenizer, not of something else of the name.

    Hugging Face repositories hold one with a few words about the repository.
    """
    try:
        values = json.loads(config.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "patch_size" in values and "levels" in values


def check_fit(tensors: Mapping[str, Tensor], config: DVConfig, source: Path) -> dict[str, Tensor]:
    """The learned tensors, if they are those of a network of this config.

    Raises:
        TokenizerError: if some are missing, extra, of another shape, not floats, or not finite.
    """
    with torch.device("meta"):
        expected = DVNetwork(config).state_dict()
    found = parameters_only(tensors)
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    wrong = [n for n, t in found.items() if n in expected and t.shape != expected[n].shape]
    for names, what in ((missing, "lacks"), (extra, "has the extra"), (wrong, "has a misshapen")):
        if names:
            raise TokenizerError(
                f"{source} {what} tensor {names[0]} (and {len(names) - 1} more): its weights are "
                f"not those of the {config.compression.name} network that its config describes."
            )
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise TokenizerError(
                f"{source} has the {dtype} tensor {name}; weights must be float32, bfloat16 or "
                "float16: convert them."
            )
        if not tensor.isfinite().all():
            raise TokenizerError(
                f"{source} has values in tensor {name} that are infinite or not a number (NaN): "
                "its training diverged, or the file is damaged; take an earlier save."
            )
    return found


def read_native(folder: Path, config: DVConfig) -> dict[str, Tensor]:
    """The learned tensors of a native folder, checked against ``config``.

    Raises:
        TokenizerError: if they are missing, corrupt, or of another network.
    """
    path = folder / WEIGHTS_FILE
    return check_fit(read_tensors(path), config, path)


def write_native(folder: Path, network: DVNetwork, dtype: torch.dtype | None = None) -> None:
    """Writes ``config.json`` and ``model.safetensors``, each atomically.

    Args:
        folder: created if absent.
        network: whose weights are written.
        dtype: of the tensors in the file; None keeps the network's.
    """
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", dtype).contiguous()
        for name, tensor in parameters_only(network.state_dict()).items()
    }
    with replacing(folder / WEIGHTS_FILE) as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, dataclasses.asdict(network.config))
