"""The native backend: folded layers, causality, chunks, memory, bfloat16, torch.compile."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.reference import golden_folders
from safetensors.torch import load_file
from test_tokenizer_network import RATES, random_video, small_network
from torch import Tensor

from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.tokenizer import load_tokenizer, native
from cosmos_posttrain.tokenizer.folding import fold
from cosmos_posttrain.tokenizer.layers import StreamCache
from cosmos_posttrain.tokenizer.native import NativeBackend, load_native

GOLDEN = golden_folders("tokenizer")
WEIGHTS = [
    *(f"golden-{name}" for name in GOLDEN),
    *(f"tiny-{rate}" for rate in RATES),
]


def load_backend(name: str) -> NativeBackend:
    """The golden case's network, or a shipped one."""
    kind, _, case = name.partition("-")
    tiny = Path(native.__file__).parent / "weights" / name
    folder = tiny if kind == "tiny" else GOLDEN[case]
    return load_native(folder, torch.device("cpu"), None)


def border_distance(backend: NativeBackend, video: Tensor) -> Tensor:
    """How far each token's latents are from the border to another code: (B, t, h, w)."""
    with torch.no_grad():
        bounded = backend.network.quantizer.bound(backend.network.latents(video))
    return (bounded - bounded.floor() - 0.5).abs().amin(dim=-1)


@pytest.mark.parametrize("name", GOLDEN)
def test_folded_network_reproduces_the_reference(name: str) -> None:
    golden = load_file(GOLDEN[name] / "io.safetensors")
    backend = load_backend(f"golden-{name}")
    with torch.no_grad():
        latents = fold(backend.network).latents(golden["video"])
    torch.testing.assert_close(
        latents.permute(0, 4, 1, 2, 3), golden["pre_quant"], atol=1e-4, rtol=0
    )
    assert torch.equal(backend.encode(golden["video"]), golden["indices"])
    video = backend.decode(golden["indices"])
    torch.testing.assert_close(video, golden["reconstruction"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("rate", RATES)
def test_folding_shares_all_other_weights_and_leaves_the_network_as_it_is(rate: str) -> None:
    network = small_network(rate)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fast = fold(network)
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    own = {tensor.data_ptr() for tensor in network.parameters()}
    copied = [p.shape for p in fast.parameters() if p.data_ptr() not in own]
    resampled = sum(
        "conv1" in name or "conv2" in name
        for name in before
        if "sample" in name and name.endswith("weight")
    )
    assert len(copied) == 2 * (2 + resampled)  # weight and bias; first, last, and resampling layers


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_index_depends_on_later_frames(name: str) -> None:
    backend = load_backend(name)
    time = backend.compression.time
    video = random_video(1, 3, 1 + 3 * time, 32, 48)
    indices, seen = backend.encode(video), 0
    for frame in (0, 1, time, time + 1, 2 * time, 3 * time):
        changed = video.clone()
        changed[:, :, frame] = -changed[:, :, frame]
        holder = 0 if frame == 0 else 1 + (frame - 1) // time
        other = backend.encode(changed)
        assert torch.equal(other[:, :holder], indices[:, :holder])
        seen += int((other[:, holder] != indices[:, holder]).any())
    assert seen >= 4  # the latent frame that holds it does see it


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("num_latents", [1, 3])
def test_chunks_give_the_indices_of_one_run(name: str, num_latents: int) -> None:
    backend = load_backend(name)
    time = backend.compression.time
    video = random_video(1, 3, 1 + 5 * time, 32, 48)
    backend.chunk_frames = 6 * time
    whole = backend.encode(video)
    backend.chunk_frames = num_latents * time
    chunked = backend.encode(video)
    # Sums in another order move a latent by 1e-5: only one that is nearer to a border may differ.
    assert not ((chunked != whole) & (border_distance(backend, video) > 1e-4)).any()
    assert (chunked != whole).float().mean() < 0.01
    decoded = backend.decode(whole)
    backend.chunk_frames = 6 * time
    torch.testing.assert_close(decoded, backend.decode(whole), atol=1e-4, rtol=0)


def test_frames_of_a_chunk_depend_on_the_frame_size_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = NativeBackend(small_network(), "")
    encode, lengths = backend._encode, []

    def recorded(video: Tensor, cache: StreamCache | None = None) -> Tensor:
        lengths.append(video.shape[2])
        return encode(video, cache)

    monkeypatch.setattr(backend, "_encode", recorded)
    monkeypatch.setattr(native, "MAX_CHUNK_PIXELS", 20 * 32 * 32)
    monkeypatch.setattr(native, "MAX_CHUNK_FRAMES", 24)
    for shape, expected in (
        ((1, 3, 49, 16, 32), [25, 24]),  # bound by frames
        ((1, 3, 49, 32, 32), [21, 20, 8]),  # bound by pixels
        ((2, 3, 49, 32, 32), [21, 20, 8]),  # whatever the batch
        ((1, 3, 21, 32, 32), [21]),
        ((1, 3, 9, 160, 160), [5, 4]),  # one latent frame at least
    ):
        lengths.clear()
        backend.encode(random_video(*shape))
        assert lengths == expected


_PEAK = """
import resource, sys, torch
from cosmos_posttrain.tokenizer import load_tokenizer
torch.set_num_threads(1)
tokenizer = load_tokenizer(sys.argv[1], device="cpu")
video = torch.empty(1, 3, int(sys.argv[2]), 64, 96).uniform_(-1, 1)
indices = tokenizer.encode(video)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
tokenizer.decode(indices)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_memory_of_a_long_clip_is_bounded() -> None:
    peaks = []
    for num_frames in (65, 513):
        # Through a shell: a process starts with the peak of the one that it was forked from.
        command = ["/bin/sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", _PEAK]
        output = subprocess.run(
            [*command, "tiny-dv4x8x8", str(num_frames)],
            check=True,
            capture_output=True,
            text=True,
            timeout=300,
        ).stdout
        peaks.append([int(value) for value in output.split()])
    (encoded_short, both_short), (encoded_long, both_long) = peaks
    assert encoded_long <= 1.3 * encoded_short
    # The clip and its reconstruction themselves are 66 MB more.
    assert both_long <= 1.35 * both_short


def smooth_video(num_frames: int, height: int, width: int) -> Tensor:
    """Moving waves of colour, (1, 3, T, H, W) in [-1, 1]."""
    t, y, x = torch.meshgrid(
        torch.arange(num_frames) / 8,
        torch.arange(height) / 24,
        torch.arange(width) / 32,
        indexing="ij",
    )
    return torch.stack([torch.sin(y + t), torch.cos(x - t), torch.sin(x + y)])[None] * 0.8


@pytest.mark.parametrize("name", [f"tiny-{rate}" for rate in RATES])
def test_bfloat16_is_close_to_float32(name: str) -> None:
    video = smooth_video(17, 64, 96)
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        tokenizer = load_tokenizer(name, device="cpu", dtype=dtype)
        decoded = tokenizer.decode(tokenizer.encode(video))
        assert decoded.dtype == dtype
        errors[dtype] = (decoded.float() - video).square().mean()
    quantizer = load_native_quantizer(name)
    assert {quantizer.half_range.dtype, quantizer.shift.dtype} == {torch.float32}
    loss = 10 * torch.log10(errors[torch.bfloat16] / errors[torch.float32])
    assert errors[torch.float32] < video.var() / 2  # the clip is reconstructed, in rough
    assert loss.abs() < 0.5  # dB


def load_native_quantizer(name: str) -> torch.nn.Module:
    folder = Path(native.__file__).parent / "weights" / name
    return load_native(folder, torch.device("cpu"), torch.bfloat16).network.quantizer


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(TokenizerError, match="no C\\+\\+ compiler"):
        load_tokenizer("tiny-dv4x8x8", device="cpu", compile=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on the CPU")
def test_compiled_network_gives_the_same() -> None:
    backend = NativeBackend(small_network("dv8x8x8"), "", chunk_frames=16)
    video = random_video(1, 3, 1 + 24, 32, 32)  # a chunk of 17 frames and one of 8
    with torch.inference_mode():
        indices = backend.encode(video)
        decoded = backend.decode(indices)
        backend.compile()
        differing = backend.encode(video) != indices
        assert not (differing & (border_distance(backend, video) > 1e-4)).any()
        torch.testing.assert_close(backend.decode(indices), decoded, atol=1e-4, rtol=0)
