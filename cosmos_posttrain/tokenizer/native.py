"""The native network as encoder and decoder, long and large clips in chunks.

Flows in: a native tokenizer folder, or a network. Flows out: a backend of ``VideoTokenizer``.

A clip of more than a chunk's frames runs in pieces; the layers carry what they need of the past
(:class:`StreamCache`), so the result is that of one run up to rounding and memory stays bounded.
The frames of a chunk depend on the frame's size alone, never on the batch or the clip's length: the
same clip gives the same tokens whatever it is batched with.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.geometry import num_pixel_frames
from cosmos_posttrain.tokenizer.folding import fold
from cosmos_posttrain.tokenizer.layers import StreamCache
from cosmos_posttrain.tokenizer.network import DVConfig, DVNetwork
from cosmos_posttrain.tokenizer.weights_io import CONFIG_FILE, encoder_sha256, read_native

# A chunk holds at most so many frames, and so many pixels: 24 frames of 320x512, 64 of 256x256. The
# widest activations take 16 bytes a pixel in the published 8x16x16 network, 128 in the 4x8x8 one.
MAX_CHUNK_FRAMES = 64
MAX_CHUNK_PIXELS = 64 * 256 * 256


class NativeBackend:
    """Encodes and decodes with a :class:`DVNetwork`.

    Attributes:
        network: in eval mode, on its device and in its dtype, with the published parameters.
        chunk_frames: frames that run at once, a multiple of the temporal compression; None
            takes as many as ``MAX_CHUNK_FRAMES`` and ``MAX_CHUNK_PIXELS`` allow.
    """

    def __init__(self, network: DVNetwork, sha256: str, chunk_frames: int | None = None) -> None:
        self.network = network.eval().requires_grad_(False)
        self.sha256 = sha256
        self.compression = network.config.compression
        self.levels = network.config.levels
        self.dtype = network.quant_conv.conv3d.weight.dtype
        self.chunk_frames = chunk_frames
        # Folded weights are sums with ones, which bfloat16 would round coarsely.
        fast = fold(self.network) if self.dtype == torch.float32 else self.network
        self._encode: Callable[..., Tensor] = fast.encode
        self._decode: Callable[..., Tensor] = fast.decode

    def compile(self) -> None:
        """Runs through ``torch.compile`` from now on; see ``VideoTokenizer.compile``.

        Raises:
            TokenizerError: if there is no C++ compiler, which PyTorch needs for the CPU.
        """
        device = self.network.quant_conv.conv3d.weight.device
        compilers = (os.environ.get("CXX", "g++"), "clang++")
        if device.type == "cpu" and not any(map(shutil.which, compilers)):
            raise TokenizerError(
                "there is no C++ compiler, which torch.compile needs on the CPU; install g++, or "
                "leave compile out."
            )
        self._encode = torch.compile(self._encode)
        self._decode = torch.compile(self._decode)

    def _chunk_latents(self, height: int, width: int) -> int:
        """Latent frames that run at once, for frames of this many pixels."""
        frames = self.chunk_frames
        if frames is None:
            frames = min(MAX_CHUNK_FRAMES, MAX_CHUNK_PIXELS // (height * width))
        return max(frames // self.compression.time, 1)

    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> indices (B, t, h, w) int32."""
        _, _, t, height, width = video.shape
        step = self._chunk_latents(height, width) * self.compression.time
        if t <= 1 + step:
            return self._encode(video)
        cache, parts = StreamCache(), []
        for start, stop in itertools.pairwise([0, *range(1 + step, t, step), t]):
            parts.append(self._encode(video[:, :, start:stop], cache))
            cache.end_chunk()
        return torch.cat(parts, dim=1)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, t, h, w) -> (B, 3, T, H, W)."""
        b, t, h, w = indices.shape
        rate = self.compression
        if t <= 1 + self._chunk_latents(h * rate.height, w * rate.width):
            return self._decode(indices)
        # Written in place: a list of parts would hold the long clip twice.
        video = torch.empty(
            (b, 3, num_pixel_frames(t, rate), h * rate.height, w * rate.width),
            dtype=self.dtype,
            device=indices.device,
        )
        done = 0
        for part in self.decode_parts(indices):
            video[:, :, done : done + part.shape[2]] = part
            done += part.shape[2]
        return video

    def decode_parts(self, indices: Tensor) -> Iterator[Tensor]:
        """The frames of ``decode`` chunk by chunk, (B, 3, n, H, W) each."""
        _, t, h, w = indices.shape
        step = self._chunk_latents(h * self.compression.height, w * self.compression.width)
        if t <= 1 + step:
            yield self._decode(indices)
            return
        cache = StreamCache()
        for start, stop in itertools.pairwise([0, *range(1 + step, t, step), t]):
            yield self._decode(indices[:, start:stop], cache)
            cache.end_chunk()


def load_native(folder: Path, device: torch.device, dtype: torch.dtype | None) -> NativeBackend:
    """Reads ``config.json`` and ``model.safetensors``.

    Args:
        folder: that holds both.
        device: to run on.
        dtype: to compute in; None means the file's own on a GPU and float32 on the CPU.

    Raises:
        TokenizerError: if a file is missing, corrupt, or of another network.
    """
    return native_backend(read_network(folder), device, dtype)


def read_network(folder: Path) -> DVNetwork:
    """The network of a native folder, on the CPU, in the file's dtype.

    Raises:
        TokenizerError: if a file is missing, corrupt, or of another network.
    """
    config = DVConfig.from_file(folder / CONFIG_FILE)
    tensors = read_native(folder, config)
    network = DVNetwork(config).to(next(iter(tensors.values())).dtype)
    network.load_state_dict(tensors)
    return network.eval()


def native_backend(
    network: DVNetwork, device: torch.device, dtype: torch.dtype | None
) -> NativeBackend:
    """Moves a network, in its checkpoint's dtype, to where it runs; see :func:`load_native`."""
    sha256 = encoder_sha256(network.state_dict())
    if dtype is None:
        own = network.quant_conv.conv3d.weight.dtype
        dtype = torch.float32 if device.type == "cpu" else own
    return NativeBackend(network.to(device, dtype), sha256)
