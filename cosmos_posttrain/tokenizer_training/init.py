"""Starting weights that make a small tokenizer trainable in minutes.

Flows in: a freshly built network. Flows out: the same network, started as a nearly linear
autoencoder: residual branches add nothing yet, convolutions over time pass the current frame, and
down- and upsampling average and repeat. The rest starts with variance-preserving weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos_posttrain.tokenizer.layers import (
    FactorizedAttention,
    HybridDownsample,
    HybridUpsample,
    PointwiseConv,
    ResidualBlock,
    SpatialConv,
    TemporalConv,
)
from cosmos_posttrain.tokenizer.network import DVNetwork


@torch.no_grad()
def initialize(network: DVNetwork) -> None:
    """Sets the starting weights in place; draws from torch's global generator."""
    for module in network.modules():
        if isinstance(module, (SpatialConv, PointwiseConv, TemporalConv)):
            conv = module.conv3d
            nn.init.normal_(conv.weight, std=conv.weight[0].numel() ** -0.5)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)
        if isinstance(module, TemporalConv):
            _pass_current_frame(module.conv3d)
    # A picture's wavelet bands are patch_size**1.5 times smaller than an orthonormal transform's.
    band_scale = network.config.patch_size**1.5
    _conv(network.encoder.conv_in[0]).weight.mul_(band_scale)
    # A token should start as a picture of its own block, not of its neighbours.
    for layer in (network.encoder.conv_in[0], network.encoder.conv_out[0]):
        _favor_center(_conv(layer))
    _favor_center(_conv(network.decoder.conv_in[0]))
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            _silence(module.conv2[1])
        elif isinstance(module, FactorizedAttention):
            _silence(module.get_submodule("0.proj_out"))
            _silence(module.get_submodule("1.proj_out"))
        elif isinstance(module, (HybridDownsample, HybridUpsample)):
            for name in ("conv1", "conv2"):
                if hasattr(module, name):
                    _silence(getattr(module, name))


@torch.no_grad()
def initialize_quantizer(network: DVNetwork, images: Tensor, latent_std: float) -> None:
    """Starts the latents as a palette coder: the mean colour of each block, then structure.

    The first three latents predict the decorrelated mean colour of their block (least squares on
    the encoder's output), the others are the principal directions of what is left. All get the
    same variance, which fills the FSQ range; a random projection would leave most codes unused.

    Args:
        network: after :func:`initialize`; its ``quant_conv`` is set in place.
        images: (B, 3, 1, H, W) in [-1, 1], representative of the training data.
        latent_std: standard deviation that each latent gets.
    """
    features = network.encoder(images).flatten(0, 3).double()
    size = network.config.spatial_compression
    colors = F.avg_pool2d(images[:, :, 0], size).permute(0, 2, 3, 1).flatten(0, 2).double()
    mean = features.mean(0)
    centered = features - mean
    colors = colors - colors.mean(0)
    _, axes = torch.linalg.eigh(torch.cov(colors.T))
    ridge = 1e-4 * centered.square().mean() * len(centered)
    gram = centered.T @ centered + ridge * torch.eye(centered.shape[1]).to(centered)
    directions = torch.linalg.solve(gram, centered.T @ (colors @ axes.flip(1)))
    predicted = centered @ directions
    # What the colours do not explain of the features, by its largest principal directions.
    explained = predicted @ torch.linalg.lstsq(predicted, centered).solution
    _, vectors = torch.linalg.eigh(torch.cov((centered - explained).T))
    directions = torch.cat([directions, vectors.flip(1)], dim=1)
    directions = directions[:, : network.config.embedding_dim]
    directions = latent_std * directions / (centered @ directions).std(0).clamp_min(1e-6)
    conv = network.quant_conv.conv3d
    assert conv.bias is not None
    conv.weight.copy_(directions.T.reshape(conv.weight.shape))
    conv.bias.copy_(-(directions.T @ mean))


@torch.no_grad()
def initialize_decoder(network: DVNetwork, clips: Tensor) -> None:
    """Sets the decoder's last layer to its least-squares solution, given the rest.

    Training then starts from a coder that is already about as good as a palette.

    Args:
        network: after :func:`initialize_quantizer`; ``decoder.conv_out`` is set in place.
        clips: (B, 3, T, H, W) in [-1, 1].
    """
    codes = network.quantizer.quantize(network.latents(clips))
    features = network.decoder.features(network.post_quant_conv(codes))
    bands = network.encoder.patcher3d(clips)
    frames = features.flatten(0, 1).permute(0, 3, 1, 2)
    inputs = F.unfold(frames, 3, padding=1).transpose(1, 2).flatten(0, 1).double()
    targets = bands.flatten(0, 3).double()
    mean_in, mean_out = inputs.mean(0), targets.mean(0)
    inputs, targets = inputs - mean_in, targets - mean_out
    gram = inputs.T @ inputs
    gram += 1e-2 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    solution = torch.linalg.solve(gram, inputs.T @ targets)
    spatial = _conv(network.decoder.conv_out[0])
    assert spatial.bias is not None
    spatial.weight.copy_(solution.T.reshape(spatial.weight.shape))
    spatial.bias.copy_(mean_out - mean_in @ solution)
    temporal = _conv(network.decoder.conv_out[1])
    nn.init.zeros_(temporal.weight)
    _pass_current_frame(temporal)


def _pass_current_frame(conv: nn.Conv3d) -> None:
    """Last tap the identity (as far as widths allow), plus weak random weights."""
    conv.weight.mul_(0.1)
    count = min(conv.in_channels, conv.out_channels)
    for i in range(count):
        conv.weight[i, i, -1] += 1.0


def _favor_center(conv: nn.Conv3d) -> None:
    """Weakens all but the middle tap of a 1x3x3 kernel."""
    mask = torch.full((3, 3), 0.2)
    mask[1, 1] = 2.0
    conv.weight.mul_(mask)


def _silence(layer: nn.Module) -> None:
    nn.init.zeros_(_conv(layer).weight)


def _conv(layer: nn.Module) -> nn.Conv3d:
    """The weights of a layer; each of ours keeps them under the published name ``conv3d``."""
    conv = layer.conv3d
    assert isinstance(conv, nn.Conv3d)
    return conv
