"""The native network as TorchScript with the published call signature, and back.

Flows in: a :class:`DVNetwork`, or TorchScript files. Flows out: ``encoder.jit`` and ``decoder.jit``
that ``torch.jit.load`` reads without this package, or the native network.

``encoder(video (B, 3, T, H, W) in [-1, 1])`` -> (indices (B, t, h, w) int32, codes (B, D, t, h, w),
loss); ``decoder(indices)`` -> video. Tensor names are the native ones, so both forms of the same
weights have the same hash.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.files import replacing
from cosmos_posttrain.tokenizer.network import DVConfig, DVNetwork
from cosmos_posttrain.tokenizer.torchscript import load_script, script_levels, script_tensors
from cosmos_posttrain.tokenizer.weights_io import (
    CONFIG_FILE,
    check_fit,
    describes_network,
    parameters_only,
)

AUTOENCODER_FILE = "autoencoder.jit"


class _EncoderModule(nn.Module):
    """The published signature around encoder, quant_conv and FSQ (with its level table)."""

    def __init__(self, network: DVNetwork) -> None:
        super().__init__()
        self.encoder = network.encoder
        self.quant_conv = network.quant_conv
        self.quantizer = network.quantizer

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes = self.quantizer.quantize(self.quant_conv(self.encoder(video)))
        indices = self.quantizer.codes_to_indices(codes)
        # FSQ has no loss of its own; the published signature has a place for one.
        loss = codes.new_zeros(1)
        return indices, codes.type_as(video).permute(0, 4, 1, 2, 3), loss


class _DecoderModule(nn.Module):
    """Indices to video."""

    def __init__(self, network: DVNetwork) -> None:
        super().__init__()
        self.quantizer = network.quantizer
        self.post_quant_conv = network.post_quant_conv
        self.decoder = network.decoder

    def forward(self, indices: Tensor) -> Tensor:
        codes = self.quantizer.indices_to_codes(indices)
        # Follows the weights' dtype when the file is run, where .to() would keep today's.
        codes = codes.type_as(self.post_quant_conv.conv3d.weight)
        video: Tensor = self.decoder(self.post_quant_conv(codes))
        return video


@contextmanager
def _quiet_tracing() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
        # Shapes are compared in Python only for checks that hold at every size.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        yield


def export_torchscript(network: DVNetwork, folder: Path) -> tuple[Path, Path]:
    """Writes ``encoder.jit`` and ``decoder.jit``; they take any clip size that fits the rate.

    Returns:
        The two paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = network.eval()
    rate = network.config.compression
    weight = network.quant_conv.conv3d.weight
    video = torch.zeros(
        2, 3, 1 + 2 * rate.time, 3 * rate.height, 4 * rate.width, device=weight.device
    ).to(weight.dtype)
    indices = torch.zeros(2, 3, 3, 4, dtype=torch.int32, device=weight.device)
    paths = (folder / "encoder.jit", folder / "decoder.jit")
    modules: tuple[nn.Module, nn.Module] = (_EncoderModule(network), _DecoderModule(network))
    for path, module, example in zip(paths, modules, (video, indices), strict=True):
        with replacing(path) as temporary, _quiet_tracing(), torch.no_grad():
            torch.jit.save(torch.jit.trace(module.eval(), example, check_trace=False), temporary)
    return paths


def import_torchscript(path: Path) -> DVNetwork:
    """The native network with the weights of published TorchScript files.

    Only names and values of parameters are used; buffers that TorchScript captured (wavelet
    filters, codebooks) are ignored, but for the table of FSQ levels.

    Args:
        path: a folder with ``encoder.jit`` and ``decoder.jit``, or with ``autoencoder.jit`` alone,
            or the latter file. A complete ``config.json`` beside them is obeyed, otherwise the
            sizes are read off the tensors.

    Returns:
        The network in eval mode on the CPU, in the files' dtype.

    Raises:
        TokenizerError: if a file is missing or they are not a DV network.
    """
    if path.is_dir():
        pair = [path / "encoder.jit", path / "decoder.jit"]
        whole = path / AUTOENCODER_FILE
        files = [whole] if whole.is_file() and not all(map(Path.is_file, pair)) else pair
    else:
        files = [path]
    return network_from_scripts({file: load_script(file) for file in files})


def network_from_scripts(scripts: Mapping[Path, torch.jit.ScriptModule]) -> DVNetwork:
    """The native network with the weights of loaded modules, encoder first.

    Raises:
        TokenizerError: if together they are not a DV network.
    """
    first = next(iter(scripts))
    tensors: dict[str, Tensor] = {}
    for module in scripts.values():
        tensors.update(parameters_only(script_tensors(module)))
    config = config_beside(first)
    if config is None:
        config = infer_config(tensors, script_levels(scripts[first], first), first)
    network = DVNetwork(config)
    network.load_state_dict(check_fit(tensors, config, first))
    return network.to(next(iter(tensors.values())).dtype).eval()


def config_beside(file: Path) -> DVConfig | None:
    """The file's own ``config.json``; None if there is none or it does not describe a network."""
    path = file.with_name(CONFIG_FILE)
    return DVConfig.from_file(path) if path.is_file() and describes_network(path) else None


def infer_config(tensors: Mapping[str, Tensor], levels: tuple[int, ...], source: Path) -> DVConfig:
    """Reads the network's sizes off its tensors' names and shapes.

    Raises:
        TokenizerError: if they are not those of a DV network.
    """
    try:
        conv_in = tensors["encoder.conv_in.0.conv3d.weight"]
        conv_out = tensors["encoder.conv_out.0.conv3d.weight"]
        channels = conv_in.shape[0]
        num_levels = _count(tensors, "encoder.down.{}.block.0.norm1.norm.weight")
        mult = tuple(
            tensors[f"encoder.down.{i}.block.0.norm2.norm.weight"].shape[0] // channels
            for i in range(num_levels)
        )
    except KeyError as error:
        raise TokenizerError(f"{source} is not a DV tokenizer: it lacks tensor {error}.") from error
    patch_size = round((conv_in.shape[1] // 3) ** (1 / 3))
    steps = [
        sum(
            f"encoder.down.{i}.downsample.{conv}.conv3d.weight" in tensors
            for i in range(num_levels)
        )
        for conv in ("conv1", "conv2")
    ]
    resolution = 1024
    attention = tuple(
        resolution // patch_size // 2**i
        for i in range(num_levels)
        if f"encoder.down.{i}.attn.0.0.q.conv3d.weight" in tensors
    )
    return DVConfig(
        channels=channels,
        channels_mult=mult,
        num_res_blocks=_count(tensors, "encoder.down.0.block.{}.norm1.norm.weight"),
        resolution=resolution,
        attn_resolutions=attention,
        patch_size=patch_size,
        z_channels=conv_out.shape[0],
        spatial_compression=patch_size * 2 ** steps[0],
        temporal_compression=patch_size * 2 ** steps[1],
        embedding_dim=len(levels),
        levels=levels,
    )


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many of ``pattern`` with 0, 1, 2, ... there are."""
    number = 0
    while pattern.format(number) in tensors:
        number += 1
    return number
