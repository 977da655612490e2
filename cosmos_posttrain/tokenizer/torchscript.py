"""TorchScript tokenizers as published: ``encoder.jit`` and ``decoder.jit``.

Flows in: two files. Flows out: backends of ``VideoTokenizer``. TorchScript is code: files are
loaded only from a path or Hugging Face id that the user named, or of the publisher's repositories
(``loading.check_recorded``).

``encoder(video (B, 3, T, H, W))`` returns (indices, codes, loss); ``decoder(indices)`` the video.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.geometry import ClipGeometry, Compression, num_pixel_frames
from cosmos_posttrain.tokenizer.weights_io import (
    check_sha256,
    encoder_sha256,
    parameters_only,
)

PUBLISHED_LEVELS = (8, 8, 8, 5, 5, 5)
# Frames and pixels of the clip that shows a file's compression: fits every published rate.
_PROBE_FRAMES, _PROBE_SIZE = 9, 64


def load_script(path: Path) -> torch.jit.ScriptModule:
    """Loads a TorchScript file onto the CPU.

    Raises:
        TokenizerError: if it is missing or not TorchScript.
    """
    if not path.is_file():
        raise TokenizerError(f"{path} does not exist; a TorchScript tokenizer needs it.")
    with warnings.catch_warnings():
        # torch 2.13 deprecates TorchScript as a whole; the published tokenizers are TorchScript.
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.load` is deprecated")
        try:
            module = torch.jit.load(str(path), map_location="cpu")
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TokenizerError(
                f"{path} is not a readable TorchScript file ({reason}); copy or download it again."
            ) from error
    return module.eval()


def script_tensors(module: torch.jit.ScriptModule) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def script_levels(module: torch.jit.ScriptModule, path: Path) -> tuple[int, ...]:
    """FSQ levels from the file's own table, or the published ones if they fit its width."""
    for name, tensor in module.named_buffers():
        if name.endswith("_levels"):
            return tuple(int(level) for level in tensor.flatten())
    for name, tensor in module.named_parameters():
        width = {"quant_conv.conv3d.weight": 0, "post_quant_conv.conv3d.weight": 1}.get(name)
        if width is not None and tensor.shape[width] != len(PUBLISHED_LEVELS):
            raise TokenizerError(
                f"{path} has {tensor.shape[width]} numbers per token and no table of FSQ levels; "
                "export it with this package."
            )
    return PUBLISHED_LEVELS


class ScriptEncoder:
    """``encoder.jit``."""

    def __init__(
        self,
        path: Path,
        device: torch.device,
        dtype: torch.dtype | None,
        expected_sha256: str | None = None,
    ) -> None:
        """Loads the file, checks its hash, and finds its compression by encoding one small clip.

        Raises:
            TokenizerError: if it has other weights than expected, or is not an encoder with the
                published call signature.
        """
        self._path = path
        module = load_script(path)
        self.sha256 = encoder_sha256(script_tensors(module))
        check_sha256(path, self.sha256, expected_sha256)
        self.levels = script_levels(module, path)
        self.module, self.dtype, grid = _run_probe(path, module, device, dtype, self._probe)
        time, height, width = grid
        if min(time - 1, height, width) < 1:
            raise _wrong_shape(path, f"a token grid {grid} for {_PROBE_FRAMES} frames")
        self.compression = Compression(
            (_PROBE_FRAMES - 1) // (time - 1), _PROBE_SIZE // height, _PROBE_SIZE // width
        )

    def _probe(self, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[int, int, int]:
        size = (1, 3, _PROBE_FRAMES, _PROBE_SIZE, _PROBE_SIZE)
        indices = self._indices(module(torch.zeros(size, device=device, dtype=dtype)))
        if indices.shape[0] != 1:
            raise _wrong_shape(self._path, f"indices {tuple(indices.shape)} for one clip")
        return indices.shape[1], indices.shape[2], indices.shape[3]

    def _indices(self, output: Any) -> Tensor:
        indices = output[0] if isinstance(output, (tuple, list)) and output else output
        if not isinstance(indices, Tensor) or indices.ndim != 4 or indices.is_floating_point():
            found = tuple(indices.shape) if isinstance(indices, Tensor) else type(indices).__name__
            raise _wrong_shape(self._path, f"{found} instead of integer indices (B, t, h, w)")
        return indices

    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> indices (B, t, h, w) int32."""
        indices = self._indices(self.module(video))
        b, _, t, height, width = video.shape
        expected = (b, *ClipGeometry(t, height, width, self.compression).latent_shape)
        _check_shape(self._path, indices, expected)
        return indices.to(torch.int32)


class ScriptDecoder:
    """``decoder.jit``."""

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype | None) -> None:
        """Loads the file and finds its compression by decoding one small grid.

        Raises:
            TokenizerError: if it is not a decoder with the published call signature.
        """
        self._path = path
        module = load_script(path)
        self.levels = script_levels(module, path)
        self.module, self.dtype, shape = _run_probe(path, module, device, dtype, self._probe)
        self.compression = Compression(shape[0] - 1, shape[1] // 4, shape[2] // 4)
        if shape[0] < 2 or min(self.compression) < 1:
            raise _wrong_shape(path, f"a clip {shape} for a token grid (2, 4, 4)")

    def _probe(self, module: Any, device: torch.device, dtype: torch.dtype) -> tuple[int, int, int]:
        video = module(torch.zeros(1, 2, 4, 4, dtype=torch.int32, device=device))
        if not isinstance(video, Tensor) or video.ndim != 5 or video.shape[:2] != (1, 3):
            found = tuple(video.shape) if isinstance(video, Tensor) else type(video).__name__
            raise _wrong_shape(self._path, f"{found} instead of a video (B, 3, T, H, W)")
        return video.shape[2], video.shape[3], video.shape[4]

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, t, h, w) -> (B, 3, T, H, W)."""
        video: Tensor = self.module(indices)
        b, t, h, w = indices.shape
        rate = self.compression
        expected = (b, 3, num_pixel_frames(t, rate), h * rate.height, w * rate.width)
        _check_shape(self._path, video, expected)
        return video


def _check_shape(path: Path, result: Tensor, expected: tuple[int, ...]) -> None:
    """Refuses what a file returns at some sizes only: a trace may hold the sizes it was made of."""
    if tuple(result.shape) != expected:
        raise TokenizerError(
            f"{path} returns shape {tuple(result.shape)} where {expected} belongs; it cannot take "
            "clips of this size: use a size that it can, or a native tokenizer."
        )


def _wrong_shape(path: Path, what: str) -> TokenizerError:
    return TokenizerError(
        f"{path} returns {what}; it is not the half of a discrete video tokenizer that was "
        "expected here (encoder.jit as encoder, decoder.jit as decoder)."
    )


def _run_probe(
    path: Path, module: Any, device: torch.device, dtype: torch.dtype | None, probe: Any
) -> tuple[Any, torch.dtype, tuple[int, int, int]]:
    """Moves the module and runs it once; falls back to its own dtype.

    A traced file may hold casts to the dtype that it was traced in, and then runs in no other.
    """
    floats = [t.dtype for t in parameters_only(script_tensors(module)).values()]
    own = floats[0] if floats else torch.float32
    wanted = dtype or (torch.float32 if device.type == "cpu" else own)
    reason = ""
    for choice in dict.fromkeys((wanted, own)):
        module = module.to(device=device, dtype=choice)
        try:
            with torch.inference_mode():
                return module, choice, probe(module, device, choice)
        except (RuntimeError, TypeError) as error:
            reason = str(error).strip().splitlines()[-1]
    raise TokenizerError(
        f"{path} cannot be run as a discrete video tokenizer ({reason}); give encoder.jit as the "
        "encoder and decoder.jit as the decoder."
    )
