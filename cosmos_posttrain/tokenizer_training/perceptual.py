"""The perceptual term: L1 between features of a frozen VGG-19.

Flows in: real and reconstructed clips (B, 3, T, H, W) in [-1, 1], and the published ImageNet
weights from a local file. Flows out: a scalar with gradients to the reconstruction.

Features are taken after relu1_2, relu2_2, relu3_4, relu4_4 and relu5_4 (the last of each block) of
VGG-19 (Simonyan and Zisserman 2015, configuration E). With phi_l the features of layer l, x a frame
and y its reconstruction, the term is the mean over frames of sum_l mean |phi_l(x) - phi_l(y)|
(Johnson et al. 2016, equation 2, with L1 for L2).
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cosmos_posttrain.errors import ConfigError

VGG_URL = "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
_BLOCKS = ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VGG19(nn.Module):
    """The convolutions of VGG-19, named ``features.N`` as in torchvision (N counts ReLUs too)."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict()
        self.blocks: list[list[str]] = []
        index, width = 0, 3
        for widths in _BLOCKS:
            names = []
            for out in widths:
                self.features[str(index)] = nn.Conv2d(width, out, 3, padding=1)
                names.append(str(index))
                index, width = index + 2, out
            self.blocks.append(names)
            index += 1  # the pool
        self.register_buffer("mean", torch.tensor(_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(3, 1, 1), persistent=False)

    def forward(self, frames: Tensor) -> list[Tensor]:
        """Frames (N, 3, H, W) in [-1, 1], at least 16x16 -> features of each block."""
        x = ((frames + 1) / 2 - self.mean) / self.std
        found = []
        for number, names in enumerate(self.blocks):
            if number > 0:
                x = F.max_pool2d(x, 2)
            for name in names:
                x = F.relu(self.features[name](x))
            found.append(x)
        return found


def load_vgg(path: Path) -> VGG19:
    """The frozen network with the weights of a local file.

    Args:
        path: ``vgg19-dcbb9e9d.pth`` or a safetensors file; tensors of other names are ignored.

    Raises:
        ConfigError: if the file is absent, unreadable, or not of this network.
    """
    network = VGG19()
    expected = network.state_dict()
    tensors = read_weights(path, f"download {VGG_URL}, or set loss.perceptual=0")
    found = {name: tensor for name, tensor in tensors.items() if name in expected}
    wrong = [n for n, t in expected.items() if n not in found or found[n].shape != t.shape]
    if wrong:
        raise ConfigError(
            f"{path} is not VGG-19: {wrong[0]} (and {len(wrong) - 1} more) is missing or of "
            f"another shape; download {VGG_URL}."
        )
    network.load_state_dict(found)
    return network.requires_grad_(False).eval()


def read_weights(path: Path, remedy: str) -> dict[str, Tensor]:
    """Tensors by name from a ``.safetensors`` file or a PyTorch file, without running its code.

    Raises:
        ConfigError: ends with ``remedy``.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ConfigError(f"the weights file {path} does not exist; {remedy}.")
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (
        *(SafetensorError, OSError, ValueError, RuntimeError, EOFError, pickle.PickleError),
        LookupError,  # torch's reader, on some damage
    ) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConfigError(f"{path} is not a readable weights file ({reason}); {remedy}.") from e
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ConfigError(f"{path} does not hold tensors by name; {remedy}.")
    return tensors


class PerceptualLoss:
    """The term of the module docstring.

    Args:
        path: file with the weights, see :func:`load_vgg`.
        device: to run on.
        max_frames: frames that run at once. Features are computed again in the backward pass, so
            that memory holds those of ``max_frames`` frames only.

    Raises:
        ConfigError: see :func:`load_vgg`.
    """

    def __init__(self, path: Path, device: torch.device, max_frames: int) -> None:
        self.network = load_vgg(path).to(device)
        self.max_frames = max_frames

    def __call__(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) in [-1, 1] -> () float32."""
        pairs = [
            v.transpose(1, 2).flatten(0, 1).split(self.max_frames) for v in (reconstruction, video)
        ]
        total = reconstruction.new_zeros(())
        for fake, real in zip(*pairs, strict=True):
            term = checkpoint(self._distance, fake, real, use_reentrant=False)
            assert isinstance(term, Tensor)
            total = total + term * len(real)
        return total / (video.shape[0] * video.shape[2])

    def _distance(self, fake: Tensor, real: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.network(real)
        pairs = zip(self.network(fake), wanted, strict=True)
        return torch.stack([(a.float() - b.float()).abs().mean() for a, b in pairs]).sum()
