"""The tokenizer on a GPU: the CPU's tokens and pictures, on this process's own device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_tokenizer_network import RATES, random_video
from test_tokenizer_streaming import border_distance, load_backend, smooth_video

from cosmos_posttrain.doctor import full_float32
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.tokenizer import load_tokenizer
from cosmos_posttrain.tokenizer.export import export_torchscript
from cosmos_posttrain.tokenizer.video_tokenizer import VideoTokenizer

pytestmark = pytest.mark.gpu


def on_gpu(name: str, dtype: str | None = "float32") -> VideoTokenizer:
    tokenizer = load_tokenizer(name, device="cuda", dtype=dtype)
    assert tokenizer.device == torch.device("cuda", 0)
    return tokenizer


@pytest.mark.parametrize("rate", RATES)
def test_float32_gives_the_tokens_and_frames_of_the_cpu(rate: str) -> None:
    name, video = f"tiny-{rate}", smooth_video(17, 64, 96)
    cpu, gpu = load_tokenizer(name, device="cpu"), on_gpu(name)
    tokens = cpu.encode(video)
    with full_float32():
        found, decoded = gpu.encode(video), gpu.decode(tokens)
    assert found.device == decoded.device == gpu.device
    # Sums in another order move a latent by about 1e-5: only near a border may a token differ.
    differing = found.cpu() != tokens
    assert not (differing & (border_distance(load_backend(name), video) > 1e-3)).any()
    assert differing.float().mean() < 0.01
    torch.testing.assert_close(decoded.cpu(), cpu.decode(tokens), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16"])
@pytest.mark.parametrize("rate", RATES)
def test_other_dtypes_reconstruct_as_well(rate: str, dtype: str | None) -> None:
    """As on the CPU, where bfloat16 costs at most 0.11 dB; None is the weights' own, with TF32."""
    name, video = f"tiny-{rate}", smooth_video(17, 64, 96)
    errors = []
    for tokenizer in (load_tokenizer(name, device="cpu"), on_gpu(name, dtype)):
        decoded = tokenizer.decode(tokenizer.encode(video)).cpu().float()
        errors.append((decoded - video).square().mean())
    assert 10 * torch.log10(errors[1] / errors[0]).abs() < 0.5


def test_memory_of_a_long_clip_is_bounded() -> None:
    gpu, peaks = on_gpu("tiny-dv4x8x8"), []
    for num_frames in (65, 65, 513):  # the first run is the libraries'
        video = random_video(1, 3, num_frames, 64, 96).to(gpu.device)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gpu.encode(video)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # Working memory depends on the algorithms that cuDNN picks for the last, shorter chunk too.
    assert peaks[2] <= 1.5 * peaks[1]


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    last = torch.cuda.device_count() - 1
    monkeypatch.setenv("LOCAL_RANK", str(last))
    others = [torch.cuda.memory_allocated(number) for number in range(last)]
    before = torch.cuda.memory_allocated(last)
    tokenizer = load_tokenizer("tiny-dv4x8x8", device=device)
    assert tokenizer.device == torch.device("cuda", last)
    tokens = tokenizer.encode(smooth_video(5, 32, 48))
    assert tokens.device == tokenizer.decode(tokens).device == tokenizer.device
    assert torch.cuda.memory_allocated(last) > before
    assert [torch.cuda.memory_allocated(number) for number in range(last)] == others
    monkeypatch.setenv("LOCAL_RANK", str(last + 1))
    with pytest.raises(ConfigError, match="too few for process"):
        load_tokenizer("tiny-dv4x8x8", device=device)


def test_torchscript_runs_on_the_gpu_as_the_native_network_does(tmp_path: Path) -> None:
    video = smooth_video(9, 32, 48)
    native = on_gpu("tiny-dv4x8x8")
    export_torchscript(load_backend("tiny-dv4x8x8").network, tmp_path)
    script = load_tokenizer(tmp_path, device="cuda", dtype="float32", native=False)
    assert not script.is_native
    with full_float32():
        tokens = native.encode(video)
        found = script.encode(video)
        decoded = script.decode(tokens)
        expected = native.decode(tokens)
    assert found.device == decoded.device == torch.device("cuda", 0)
    assert (found != tokens).float().mean() < 0.01
    torch.testing.assert_close(decoded, expected, atol=1e-3, rtol=0)
