"""The native DV network: parity with the reference, its parts, causality, chunks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.reference import SHIPPED_DIR, golden_folders
from safetensors.torch import load_file

from cosmos_posttrain import doctor
from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.tokenizer.fsq import FSQ
from cosmos_posttrain.tokenizer.haar import HaarPatcher, HaarUnpatcher, haar_matrix
from cosmos_posttrain.tokenizer.native import NativeBackend, load_native
from cosmos_posttrain.tokenizer.network import DVConfig, DVNetwork

GOLDEN = golden_folders("tokenizer")
RATES = ("dv4x8x8", "dv8x8x8", "dv8x16x16")
SIZES = {"dv4x8x8": (4, 8), "dv8x8x8": (8, 8), "dv8x16x16": (8, 16)}


def small_network(rate: str = "dv4x8x8", seed: int = 0) -> DVNetwork:
    """A random network with attention and every kind of resampling."""
    time, space = SIZES[rate]
    config = DVConfig(
        channels=8,
        channels_mult=(1, 2, 2),
        num_res_blocks=1,
        resolution=64,
        attn_resolutions=(8,),
        patch_size=2 if rate == "dv4x8x8" else 4,
        z_channels=8,
        spatial_compression=space,
        temporal_compression=time,
        embedding_dim=3,
        levels=(8, 5, 5),
    )
    torch.manual_seed(seed)
    network = DVNetwork(config).eval()
    with torch.no_grad():
        # Fresh weights give nearly constant latents: unit variance makes many codes occur.
        latents = network.latents(random_video(1, 3, 1 + 2 * time, 64, 64)).flatten(0, 3)
        conv = network.quant_conv.conv3d
        assert conv.bias is not None
        conv.bias.sub_(latents.mean(0)).div_(latents.std(0))
        conv.weight.div_(latents.std(0)[:, None, None, None, None])
    return network


def random_video(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(shape, generator=generator) * 2 - 1


@pytest.mark.parametrize("name", GOLDEN)
def test_parity_with_the_reference(name: str) -> None:
    folder = GOLDEN[name]
    golden = load_file(folder / "io.safetensors")
    network = load_native(folder, torch.device("cpu"), None).network
    with torch.no_grad():
        latents = network.latents(golden["video"])
        codes = network.quantizer.quantize(latents)
        indices = network.quantizer.codes_to_indices(codes)
        reconstruction = network.decode(indices)
    assert torch.equal(indices, golden["indices"])
    assert indices.dtype == torch.int32
    # Sums of a few thousand float32 products in another order differ by about 1e-5.
    torch.testing.assert_close(
        latents.permute(0, 4, 1, 2, 3), golden["pre_quant"], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(codes.permute(0, 4, 1, 2, 3), golden["codes"], atol=1e-4, rtol=0)
    torch.testing.assert_close(reconstruction, golden["reconstruction"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate", ["dv8x8x8", "dv8x16x16"])
def test_what_agreed_with_the_reference_is_unchanged(rate: str) -> None:
    """The rates whose reference weights are too large to be shipped, with computed weights."""
    folder = SHIPPED_DIR / "tokenizer" / rate
    golden = load_file(folder / "io.safetensors")
    network, video = doctor.tokenizer_case(folder)
    with torch.no_grad():
        indices = network.encode(video)
        reconstruction = network.decode(golden["indices"])[..., ::2, ::2]
    assert torch.equal(indices, golden["indices"])
    expected = golden["reconstruction"]
    # Sums in another order, as above; float64 differs by 1e-6 of the largest.
    torch.testing.assert_close(
        reconstruction, expected, atol=1e-5 * float(expected.abs().max()), rtol=0
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_parameter_names_are_the_published_ones(name: str) -> None:
    folder = GOLDEN[name]
    published = {
        name
        for name in load_file(folder / "model.safetensors")
        if name.endswith((".weight", ".bias"))
    }
    assert set(DVNetwork(DVConfig.from_file(folder / "config.json")).state_dict()) == published


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_haar_round_trip(patch_size: int) -> None:
    video = random_video(2, 3, 1 + 2 * patch_size, 3 * patch_size, 2 * patch_size)
    bands = HaarPatcher(patch_size)(video)
    assert bands.shape == (2, 3, 3, 2, 3 * patch_size**3)
    torch.testing.assert_close(HaarUnpatcher(patch_size)(bands), video, atol=1e-5, rtol=0)


def test_haar_first_band_is_the_mean_and_bands_are_orthogonal() -> None:
    matrix = haar_matrix(4)
    assert torch.equal(matrix[0], torch.ones(64))
    assert torch.equal(matrix @ matrix.T, 64 * torch.eye(64))
    # Band 1 of one level is LLH: a difference along the width only.
    assert haar_matrix(2)[1].tolist() == [1, -1, 1, -1, 1, -1, 1, -1]


@pytest.mark.parametrize("levels", [(8, 8, 8, 5, 5, 5), (8, 5, 5, 5), (4, 3)])
def test_fsq_numbers_every_code_once(levels: tuple[int, ...]) -> None:
    quantizer = FSQ(levels)
    indices = torch.arange(quantizer.vocab_size, dtype=torch.int32)
    codes = quantizer.indices_to_codes(indices)
    assert codes.abs().max() <= 1
    assert torch.equal(quantizer.codes_to_indices(codes), indices)
    assert codes[1, 0] > codes[0, 0] and torch.equal(codes[1, 1:], codes[0, 1:])


def test_fsq_extremes_stay_in_range_and_bfloat16_changes_no_table() -> None:
    quantizer = FSQ((8, 5)).to(torch.bfloat16)
    assert quantizer.half_range.dtype == torch.float32
    extremes = torch.tensor([[-100.0, -100.0], [100.0, 100.0]])
    assert quantizer.codes_to_indices(quantizer.quantize(extremes)).tolist() == [0, 39]


def test_fsq_gradient_passes_through_the_rounding() -> None:
    latents = torch.zeros(1, 2, requires_grad=True)
    FSQ((5, 5)).quantize(latents).sum().backward()
    assert latents.grad is not None and (latents.grad > 0.5).all()


@pytest.mark.parametrize("rate", RATES)
def test_no_index_depends_on_later_frames(rate: str) -> None:
    network, time = small_network(rate), SIZES[rate][0]
    video = random_video(1, 3, 1 + 3 * time, 32, 32)
    with torch.no_grad():
        indices, latents = network.encode(video), network.latents(video)
        for frame in range(video.shape[2]):
            changed = video.clone()
            changed[:, :, frame] *= -1
            holder = 0 if frame == 0 else 1 + (frame - 1) // time
            assert torch.equal(network.encode(changed)[:, :holder], indices[:, :holder])
            # The latent frame that holds it does see it.
            change = (network.latents(changed) - latents)[:, holder].abs().max()
            assert change > 1e-3


@pytest.mark.parametrize("rate", RATES)
def test_chunks_give_the_same_result_as_one_run(rate: str) -> None:
    time = SIZES[rate][0]
    whole = NativeBackend(small_network(rate), "", chunk_frames=1000)
    chunked = NativeBackend(small_network(rate), "", chunk_frames=2 * time)
    video = random_video(1, 3, 1 + 5 * time, 32, 48)
    with torch.no_grad():
        indices = whole.encode(video)
        # Only a latent that lies on a rounding boundary may differ.
        assert (chunked.encode(video) != indices).float().mean() < 0.01
        torch.testing.assert_close(
            chunked.decode(indices), whole.decode(indices), atol=1e-4, rtol=0
        )


def test_batch_gives_the_same_indices_as_single_clips() -> None:
    network = small_network()
    video = random_video(3, 3, 5, 32, 32)
    with torch.no_grad():
        together = network.encode(video)
        alone = torch.cat([network.encode(clip[None]) for clip in video])
    assert (together != alone).float().mean() < 0.01


@pytest.mark.parametrize(
    "change",
    [
        {"patch_method": "rearrange"},
        {"levels": [8, 8]},
        {"patch_size": 3},
        {"patch_size": 16},
        {"channels_mult": [2]},
        {"channels_mult": [2, 4], "spatial_compression": 8},
        {"channels": "many"},
    ],
)
def test_config_that_cannot_be_built_is_refused(change: dict[str, object]) -> None:
    values: dict[str, object] = {
        "channels": 8,
        "patch_size": 4,
        "spatial_compression": 16,
        "temporal_compression": 8,
        "levels": [8, 8, 8, 5, 5, 5],
    }
    DVConfig.from_dict(values)
    with pytest.raises(TokenizerError, match="config"):
        DVConfig.from_dict(values | change)


def test_config_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(TokenizerError, match="not a readable JSON"):
        DVConfig.from_file(path)
