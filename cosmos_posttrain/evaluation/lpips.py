"""LPIPS: how different two pictures look to a network (Zhang et al. 2018, arXiv:1801.03924).

Flows in: frames (N, 3, H, W) in [-1, 1] and the user's weights. Flows out: a distance for each,
0 for equal ones. Version 0.1 of the paper's authors, on AlexNet: with f_l the features after the
l-th of five ReLUs, each pixel's scaled to length 1, and w_l the learned weights of their channels,

    d(x, y) = sum over l of the mean over pixels of w_l . (f_l(x) - f_l(y))^2

The authors' package computes the same; it imports torchvision, which has no build for the CPU alone
on the package index, and fetches weights by itself.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.tokenizer_training.perceptual import read_weights
from cosmos_posttrain.video import to_float

LINEAR_FILE = "alex.pth"
BACKBONE_FILES = "alexnet*.pth"
_REMEDY = (
    "put torchvision's alexnet-owt-7be5be79.pth and alex.pth of the lpips package (version 0.1) "
    "there, or leave --lpips_weights out"
)
# Inputs, outputs, kernel, stride and padding of torchvision's features.N; a pool comes before the
# second and the third.
_LAYERS = {
    0: (3, 64, 11, 4, 2),
    3: (64, 192, 5, 1, 2),
    6: (192, 384, 3, 1, 1),
    8: (384, 256, 3, 1, 1),
    10: (256, 256, 3, 1, 1),
}
_POOL_BEFORE = (3, 6)
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_EPSILON = 1e-10
MIN_SIZE = 31  # below it the last features have no pixel


class LPIPS(nn.Module):
    """The distance; (N, 3, H, W) float32 in [-1, 1] twice, H and W at least 31 -> (N,)."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {
                str(number): nn.Conv2d(inputs, outputs, kernel, stride, padding)
                for number, (inputs, outputs, kernel, stride, padding) in _LAYERS.items()
            }
        )
        self.weights = nn.ParameterList(
            [torch.ones(outputs) for _, outputs, *_ in _LAYERS.values()]
        )
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1), persistent=False)

    def _features(self, frames: Tensor) -> list[Tensor]:
        x = (frames - self.shift) / self.scale
        found = []
        for name, layer in self.features.items():
            if int(name) in _POOL_BEFORE:
                x = F.max_pool2d(x, 3, 2)
            x = F.relu(layer(x))
            found.append(x / (x.square().sum(1, keepdim=True).sqrt() + _EPSILON))
        return found

    def forward(self, frames: Tensor, others: Tensor) -> Tensor:
        pairs = zip(self._features(frames), self._features(others), self.weights, strict=True)
        parts = [
            ((a - b).square() * weights.view(-1, 1, 1)).sum(1).mean((1, 2))
            for a, b, weights in pairs
        ]
        return torch.stack(parts).sum(0)

    def by_frame(self, clip: Tensor, other: Tensor) -> list[float]:
        """The distance of each frame of two clips (3, T, H, W) uint8."""
        with torch.inference_mode():
            return [
                float(self(self._frame(clip, t), self._frame(other, t)))
                for t in range(clip.shape[1])
            ]

    def _frame(self, clip: Tensor, number: int) -> Tensor:
        return to_float(clip[:, number].to(self.shift.device))[None]


def load_lpips(folder: Path, device: torch.device) -> LPIPS:
    """The frozen network with the weights of two local files.

    Raises:
        ConfigError: they are missing, damaged, or not of this network.
    """
    backbones = sorted(folder.glob(BACKBONE_FILES))
    if not backbones or not (folder / LINEAR_FILE).is_file():
        missing = LINEAR_FILE if backbones else BACKBONE_FILES
        raise ConfigError(f"--lpips_weights {folder} holds no {missing}; {_REMEDY}.")
    tensors = read_weights(backbones[0], _REMEDY) | read_weights(folder / LINEAR_FILE, _REMEDY)
    network = LPIPS()
    state = {}
    for index, number in enumerate(_LAYERS):
        state[f"weights.{index}"] = tensors.get(f"lin{index}.model.1.weight", torch.empty(0))
        for part in ("weight", "bias"):
            name = f"features.{number}.{part}"
            state[name] = tensors.get(name, torch.empty(0))
    for name, wanted in network.state_dict().items():
        if state[name].numel() != wanted.numel():
            raise ConfigError(f"{folder} holds other weights than LPIPS' ({name}); {_REMEDY}.")
        state[name] = state[name].reshape(wanted.shape)
    network.load_state_dict(state)
    return network.requires_grad_(False).eval().to(device)
