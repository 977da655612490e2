"""The native network as encoder and decoder, long clips in chunks.

Flows in: a native tokenizer folder. Flows out: a backend of ``VideoTokenizer``.

A clip longer than ``chunk_frames`` runs in pieces; the layers carry what they need of the past
(:class:`StreamCache`), so the result is that of one run up to rounding and memory stays bounded.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from cosmos_posttrain.geometry import num_pixel_frames
from cosmos_posttrain.tokenizer.layers import StreamCache
from cosmos_posttrain.tokenizer.network import DVConfig, DVNetwork
from cosmos_posttrain.tokenizer.weights_io import CONFIG_FILE, encoder_sha256, read_native

DEFAULT_CHUNK_FRAMES = 64


class NativeBackend:
    """Encodes and decodes with a :class:`DVNetwork`.

    Attributes:
        network: in eval mode, on its device and in its dtype.
        chunk_frames: frames that run at once, a multiple of the temporal compression.
    """

    def __init__(
        self, network: DVNetwork, sha256: str, chunk_frames: int = DEFAULT_CHUNK_FRAMES
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.sha256 = sha256
        self.compression = network.config.compression
        self.levels = network.config.levels
        self.dtype = network.quant_conv.conv3d.weight.dtype
        self.chunk_frames = chunk_frames

    @property
    def _chunk_latents(self) -> int:
        return max(self.chunk_frames // self.compression.time, 1)

    def encode(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> indices (B, t, h, w) int32."""
        step = self._chunk_latents * self.compression.time
        if video.shape[2] <= 1 + step:
            return self.network.encode(video)
        cache, parts = StreamCache(), []
        bounds = [0, *range(1 + step, video.shape[2], step), video.shape[2]]
        for start, stop in itertools.pairwise(bounds):
            parts.append(self.network.encode(video[:, :, start:stop], cache))
            cache.end_chunk()
        return torch.cat(parts, dim=1)

    def decode(self, indices: Tensor) -> Tensor:
        """Indices (B, t, h, w) -> (B, 3, T, H, W)."""
        step = self._chunk_latents
        if indices.shape[1] <= 1 + step:
            return self.network.decode(indices)
        cache, rate = StreamCache(), self.compression
        b, t, h, w = indices.shape
        # Written in place: a list of parts would hold the long clip twice.
        video = torch.empty(
            (b, 3, num_pixel_frames(t, rate), h * rate.height, w * rate.width),
            dtype=self.dtype,
            device=indices.device,
        )
        done = 0
        for start, stop in itertools.pairwise([0, *range(1 + step, t, step), t]):
            part = self.network.decode(indices[:, start:stop], cache)
            video[:, :, done : done + part.shape[2]] = part
            done += part.shape[2]
            cache.end_chunk()
        return video


def load_native(folder: Path, device: torch.device, dtype: torch.dtype | None) -> NativeBackend:
    """Reads ``config.json`` and ``model.safetensors``.

    Args:
        folder: that holds both.
        device: to run on.
        dtype: to compute in; None means the file's own on a GPU and float32 on the CPU.

    Raises:
        TokenizerError: if a file is missing, corrupt, or of another network.
    """
    config = DVConfig.from_file(folder / CONFIG_FILE)
    tensors = read_native(folder, config)
    sha256 = encoder_sha256(tensors)
    if dtype is None:
        own = next(iter(tensors.values())).dtype
        dtype = torch.float32 if device.type == "cpu" else own
    network = DVNetwork(config)
    network.load_state_dict(tensors)
    return NativeBackend(network.to(device, dtype), sha256)
