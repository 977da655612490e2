"""The adversarial fine-tune: a small discriminator of space-time patches.

Flows in: real and reconstructed clips (B, 3, T, H, W) in [-1, 1]. Flows out: a term of the
tokenizer's loss, and a discriminator that has been moved on.

With D the discriminator, x the real clip, y the reconstruction and L_rec the reconstruction loss:

    L_D   = 1/2 mean relu(1 - D(x)) + 1/2 mean relu(1 + D(y))        (hinge, Lim and Ye 2017)
    L_adv = weight * a * mean(-D(y)),   a = |grad L_rec| / (|grad mean(-D(y))| + 1e-4)

The gradients in the adaptive weight a are those of the decoder's last layer (Esser et al. 2021,
VQGAN, equation 7); a is clamped to [0, adaptive_limit] and carries no gradient itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from cosmos_posttrain.tokenizer_training.config import AdversarialConfig
from cosmos_posttrain.tokenizer_training.model_step import autocast, clip_gradients
from cosmos_posttrain.tokenizer_training.parallel import DataParallelRanks


class Discriminator(nn.Module):
    """3D convolutional PatchGAN (Isola et al. 2017): one score for each patch of space and time.

    Four 3x4x4 convolutions, the first without norm, then a 3x3x3 one to the score. Space is halved
    three times, time twice, so that an image is a clip of one frame. GroupNorm and not BatchNorm or
    spectral norm: it looks at each clip alone and has no state, so scores do not depend on how a
    batch is split among processes, and resuming needs the weights only.

    Args:
        channels: width of the first layer.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        strides = ((1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1))
        for i, stride in enumerate(strides):
            out = channels * 2 ** min(i, 3)
            layers.append(nn.Conv3d(width, out, (3, 4, 4), stride, padding=(1, 2, 2)))
            if i > 0:
                layers.append(nn.GroupNorm(1, out))
            layers.append(nn.LeakyReLU(0.2))
            width = out
        self.layers = nn.Sequential(*layers, nn.Conv3d(width, 1, 3, padding=1))

    def forward(self, clips: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] -> scores (B, 1, t, h, w), high for real ones."""
        scores: Tensor = self.layers(clips)
        return scores


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """L_D of the module docstring from scores of real and reconstructed patches."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


class Adversary:
    """Discriminator, its optimizer, and the term that it gives the tokenizer.

    Args:
        config: the fine-tune's settings.
        seed: of the discriminator's first weights.
        device: to run on.
        precision: ``float32``, or ``bfloat16`` for autocast.
        ranks: that gradients are averaged over.
    """

    def __init__(
        self,
        config: AdversarialConfig,
        seed: int,
        device: torch.device,
        precision: str,
        ranks: DataParallelRanks,
    ) -> None:
        self.config, self.precision, self.ranks = config, precision, ranks
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.discriminator = Discriminator(config.channels).to(device)
        self.parallel: nn.Module = self.discriminator
        self.optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=config.lr, betas=(0.5, 0.9)
        )

    def distribute(self, device: torch.device) -> None:
        """Averages gradients over the processes from now on; their group must exist."""
        self.parallel = self.ranks.wrap(self.discriminator, device)

    def generator_term(
        self, reconstruction: Tensor, loss: Tensor, last_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L_adv of the module docstring.

        Args:
            reconstruction: (B, 3, T, H, W), with its graph.
            loss: () L_rec, with its graph.
            last_weight: of the decoder's last layer.

        Returns:
            L_adv () and the adaptive weight (), which has no graph.
        """
        # Detached weights: this term is the tokenizer's business alone.
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        with autocast(reconstruction.device, self.precision):
            scores = functional_call(self.discriminator, frozen, (reconstruction,))
        term = -scores.float().mean()
        norms = [
            self.ranks.mean(torch.autograd.grad(value, last_weight, retain_graph=True)[0]).norm()
            for value in (loss, term)
        ]
        adaptive = (norms[0] / (norms[1] + 1e-4)).clamp(0, self.config.adaptive_limit)
        return self.config.weight * adaptive * term, adaptive

    def loss(self, reconstruction: Tensor, video: Tensor) -> Tensor:
        """L_D of the module docstring, with gradients to the discriminator alone."""
        both = torch.cat([video, reconstruction.detach()])
        with autocast(video.device, self.precision):
            scores = self.parallel(both).float()
        real, fake = scores.chunk(2)
        return hinge_loss(real, fake)

    def backward(self, loss: Tensor) -> Tensor:
        """The discriminator's gradients; returns their norm (), equal in all processes."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return clip_gradients(self.discriminator.parameters(), 0)

    def step(self) -> None:
        """One step of the discriminator's optimizer."""
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.optimizer.load_state_dict(state["optimizer"])
