"""All terms of the tokenizer's loss but the adversarial one, put together.

Flows in: latents, reconstruction and real clips of a step. Flows out: a scalar to minimise, and
the terms that are switched on, to log.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cosmos_posttrain.tokenizer.fsq import FSQ
from cosmos_posttrain.tokenizer_training.config import LossConfig
from cosmos_posttrain.tokenizer_training.entropy import code_entropy_loss
from cosmos_posttrain.tokenizer_training.flow import FlowLoss, make_flow_loss
from cosmos_posttrain.tokenizer_training.losses import reconstruction_loss
from cosmos_posttrain.tokenizer_training.model_step import autocast
from cosmos_posttrain.tokenizer_training.parallel import DataParallelRanks
from cosmos_posttrain.tokenizer_training.perceptual import PerceptualLoss


@dataclass(frozen=True)
class Losses:
    """What a step minimises.

    Attributes:
        reconstruction: () all that compares pictures; what the adversarial term is weighed by.
        total: () the same plus the entropy term.
        terms: () each of the terms that needs a switch, unweighted.
    """

    reconstruction: Tensor
    total: Tensor
    terms: dict[str, Tensor]


class Objective:
    """Holds the networks that terms need and adds the terms up.

    Args:
        config: weights of the terms.
        device: to run on.
        precision: of the feature networks, ``float32`` or ``bfloat16``.
        ranks: over which the entropy term counts codes.

    Raises:
        ConfigError: if a file or library that a term needs is missing or does not fit.
    """

    def __init__(
        self, config: LossConfig, device: torch.device, precision: str, ranks: DataParallelRanks
    ) -> None:
        self.config, self.precision, self.ranks = config, precision, ranks
        self.perceptual: PerceptualLoss | None = None
        self.flow: FlowLoss | None = None
        if config.perceptual > 0:
            assert config.vgg_weights is not None  # validate() has asked for it
            path = Path(config.vgg_weights)
            self.perceptual = PerceptualLoss(path, device, config.vgg_frames)
        if config.flow > 0:
            self.flow = make_flow_loss(config.flow_weights, device)

    def __call__(
        self, latents: Tensor, reconstruction: Tensor, video: Tensor, quantizer: FSQ
    ) -> Losses:
        """Adds the terms up.

        Args:
            latents: (B, t, h, w, D) float32.
            reconstruction: (B, 3, T, H, W) float32.
            video: (B, 3, T, H, W) float32 in [-1, 1].
            quantizer: of the network.
        """
        terms: dict[str, Tensor] = {}
        loss = reconstruction_loss(reconstruction, video, self.config)
        if self.perceptual is not None:
            with autocast(video.device, self.precision):
                terms["perceptual"] = self.perceptual(reconstruction, video)
            loss = loss + self.config.perceptual * terms["perceptual"]
        if self.flow is not None and video.shape[2] > 1:
            terms["flow"] = self.flow(reconstruction, video)
            loss = loss + self.config.flow * terms["flow"]
        total = loss
        if self.config.entropy > 0:
            # The entropy of the mean is not the mean of entropies: it needs the whole batch.
            everything = self.ranks.gather_with_gradients(latents)
            temperature = self.config.entropy_temperature
            terms["entropy"] = code_entropy_loss(everything, quantizer, temperature)
            total = total + self.config.entropy * terms["entropy"]
        return Losses(loss, total, terms)
