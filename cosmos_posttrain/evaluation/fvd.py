"""rFVD: how far two sets of videos are apart (Unterthiner et al. 2018, arXiv:1812.01717).

Flows in: clips (T, H, W, 3) uint8 and the user's I3D network. Flows out: features of each clip, and
of two sets of them the Fréchet distance between the normal distributions of their features:

    |m - n|^2 + trace(C + D - 2 (C D)^(1/2))

with the means m, n and the covariances C, D. The network is the usual ``i3d_torchscript.pt``: it
takes (B, 3, T, 224, 224) in [-1, 1] and returns the features before its softmax. TorchScript is
code: it is loaded from the path that the user names and nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from cosmos_posttrain.errors import ConfigError, TokenizerError
from cosmos_posttrain.tokenizer.torchscript import load_script

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

MIN_FRAMES = 10  # what I3D's strides leave something of
_SIZE = 224
_REMEDY = "give i3d_torchscript.pt, or leave --fvd_weights out"


class I3D:
    """The network of a TorchScript file.

    Args:
        path: the file.
        device: to run on.

    Attributes:
        width: numbers that describe a clip.

    Raises:
        ConfigError: it is missing, damaged, or another network.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            self._network = load_script(path).to(device)
        except TokenizerError as error:
            raise ConfigError(f"--fvd_weights {path} cannot be loaded; {_REMEDY}.") from error
        self._device = device
        try:
            self.width = len(self(np.zeros((MIN_FRAMES, 8, 8, 3), np.uint8)))
        except (RuntimeError, TypeError) as error:
            raise ConfigError(f"--fvd_weights {path} is another network; {_REMEDY}.") from error

    def __call__(self, clip: NDArray[np.uint8]) -> Array:
        """(T, H, W, 3) uint8, T at least 10 -> (width,) float64."""
        frames = torch.from_numpy(clip).to(self._device).permute(0, 3, 1, 2).float()
        small = F.interpolate(frames, (_SIZE, _SIZE), mode="bilinear", align_corners=False)
        video = (small / 127.5 - 1).transpose(0, 1)[None]
        with torch.inference_mode():
            features = self._network(video, rescale=False, resize=False, return_features=True)
        found: Array = features.flatten().double().cpu().numpy()
        return found


def no_moments(width: int) -> dict[str, Array]:
    """Sums over no clips; see ``moments``."""
    return {
        f"{side}_{name}": np.zeros(shape)
        for side in ("reference", "target")
        for name, shape in (("sum", (width,)), ("products", (width, width)))
    }


def moments(reference: Array, target: Array) -> dict[str, Array]:
    """What one pair of features (width,) adds to the sums of which ``distance`` is made."""
    found: dict[str, Array] = {}
    for side, features in (("reference", reference), ("target", target)):
        products: Array = features[:, None] * features
        found |= {f"{side}_sum": features, f"{side}_products": products}
    return found


def distance(sums: dict[str, Array], count: int) -> float:
    """The Fréchet distance of ``count`` pairs, at least two, from their ``moments`` added up."""
    means, covariances = [], []
    for side in ("reference", "target"):
        mean = sums[f"{side}_sum"] / count
        product = sums[f"{side}_products"] - count * np.outer(mean, mean)
        means.append(mean)
        covariances.append(product / (count - 1))
    root = _root(covariances[0])
    # (C D)^(1/2) has the trace of (C^(1/2) D C^(1/2))^(1/2), which is symmetric.
    cross = np.linalg.eigvalsh(root @ covariances[1] @ root)
    traces = np.trace(covariances[0]) + np.trace(covariances[1])
    return float(((means[0] - means[1]) ** 2).sum() + traces - 2 * _positive_root(cross).sum())


def _root(matrix: Array) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    result: Array = (vectors * _positive_root(values)) @ vectors.T
    return result


def _positive_root(values: NDArray[Any]) -> Array:
    """Rounding makes eigenvalues of 0 a little negative."""
    result: Array = np.sqrt(np.maximum(values, 0))
    return result
