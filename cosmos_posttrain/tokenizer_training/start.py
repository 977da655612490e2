"""Where a tokenizer training starts: the network, its first weights, and checks of both.

Flows in: the config and the clips. Flows out: a network that is ready to train. Weights come from a
seed (and then from the data, see ``init``), or from another tokenizer: any path that
``load_tokenizer`` takes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Generator, Tensor

from cosmos_posttrain.errors import ConfigError, TokenizerError
from cosmos_posttrain.geometry import ClipGeometry
from cosmos_posttrain.tokenizer.loading import load_network
from cosmos_posttrain.tokenizer.network import DVConfig, DVNetwork
from cosmos_posttrain.tokenizer.weights_io import check_fit
from cosmos_posttrain.tokenizer_training.config import TokenizerDataConfig, TokenizerTrainConfig
from cosmos_posttrain.tokenizer_training.data import ClipSource
from cosmos_posttrain.tokenizer_training.init import (
    initialize,
    initialize_decoder,
    initialize_quantizer,
)


def seeded_generator(seed: int, step: int) -> Generator:
    """The random numbers of one step; negative steps are those of the start."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def check_crops(data: TokenizerDataConfig, network: DVConfig) -> None:
    """Refuses training clips that the network cannot encode.

    Raises:
        GeometryError: names the sizes that would fit.
    """
    for height, width in data.crop_sizes:
        ClipGeometry(data.num_frames, height, width, network.compression)


def check_material(clips: ClipSource, data: TokenizerDataConfig) -> None:
    """Refuses material that holds no whole training clip, or that a crop does not fit into.

    Raises:
        ConfigError: if every video is too short, or one is too small.
    """
    for videos in filter(None, (clips.videos, clips.extra)):
        longest = max(video.levels[0].shape[1] for video in videos)
        if longest < data.num_frames:
            raise ConfigError(
                f"a training clip has {data.num_frames} frames, but the longest video leaves "
                f"{longest} for training; give longer videos or lower data.num_frames."
            )
    for source in (*clips.videos, *clips.extra, *clips.stills):
        for height, width in data.crop_sizes:
            largest = source.levels[-1]
            if largest.shape[2] < height or largest.shape[3] < width:
                raise ConfigError(
                    f"{source.name} is {largest.shape[3]}x{largest.shape[2]}, smaller than the "
                    f"training crop {width}x{height}; make data.crop_sizes smaller."
                )


def load_start(config: TokenizerTrainConfig) -> tuple[DVConfig, Mapping[str, Tensor] | None]:
    """The network's sizes and, with ``init_from``, the weights that it starts from.

    Raises:
        TokenizerError: if the weights are missing, corrupt, or of another network.
        UserError: if ``init_from`` cannot be found.
    """
    wanted = DVConfig.from_dict(config.network) if config.network else None
    if config.init_from is None:
        assert wanted is not None
        return wanted, None
    # A rate tells which one ``tiny`` means.
    network = load_network(config.init_from, None if wanted is None else wanted.compression)
    own, tensors = network.config, network.state_dict()
    if wanted is not None and wanted.compression != own.compression:
        raise TokenizerError(
            f"{config.init_from} compresses by {own.compression.name}, but the config's network "
            f"by {wanted.compression.name}; give weights of that rate, or leave the network "
            "section out."
        )
    return wanted or own, check_fit(tensors, wanted or own, Path(config.init_from))


def build_network(
    network_config: DVConfig, weights: Mapping[str, Tensor] | None, seed: int
) -> DVNetwork:
    """A network on the CPU, with seeded weights or the given ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = DVNetwork(network_config)
        if weights is None:
            # Numbers are drawn in the order of memory. Drawn here, and copied into a network that
            # keeps its own layout, they are the same whatever that layout is.
            drawn = copy.deepcopy(network)
            for parameter in drawn.parameters():
                parameter.data = parameter.data.contiguous()
            initialize(drawn)
            weights = drawn.state_dict()
    network.load_state_dict(weights)
    return network


def start_from_data(
    network: DVNetwork, clips: ClipSource, config: TokenizerTrainConfig, device: torch.device
) -> None:
    """Closed-form starting weights of the quantizer's and the decoder's last layers."""
    height, width = config.data.crop_sizes[0]

    def batch(size: int, num_frames: int, step: int) -> Tensor:
        generator = seeded_generator(config.seed, step)
        return clips.batch(size, num_frames, (height, width), generator).to(device)

    images = batch(max(8 * config.batch_size, 64), 1, -1)
    initialize_quantizer(network, images, config.latent_std)
    initialize_decoder(network, batch(3 * config.batch_size, config.data.num_frames, -2))
