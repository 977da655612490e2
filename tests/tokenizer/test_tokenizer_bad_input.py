"""What a user gets wrong: one sentence that names the fix, and exit code 2."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.script_here import run_here
from safetensors.torch import load_file, save_file
from test_tokenizer_network import random_video, small_network
from torch import Tensor, nn

from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.tokenizer import load_tokenizer
from cosmos_posttrain.tokenizer.export import export_torchscript
from cosmos_posttrain.tokenizer.torchscript import ScriptEncoder
from cosmos_posttrain.tokenizer.weights_io import write_native
from cosmos_posttrain.video import write_mp4


class _WrongOutput(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        return video.mean(dim=1)


def write_script(module: nn.Module, path: Path, example: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(module, example, check_trace=False), path)


def _other_rate(folder: Path) -> None:
    write_native(folder, small_network("dv8x8x8"))
    weights = (folder / "model.safetensors").read_bytes()
    write_native(folder, small_network("dv4x8x8"))
    (folder / "model.safetensors").write_bytes(weights)


def _other_factor(folder: Path) -> None:
    write_native(folder, small_network("dv8x8x8"))


def _truncated(folder: Path) -> None:
    write_native(folder, small_network())
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _corrupt(folder: Path) -> None:
    write_native(folder, small_network())
    (folder / "model.safetensors").write_bytes(b"\xff" * 1000)


def _wrong_outputs(folder: Path) -> None:
    for name in ("encoder.jit", "decoder.jit"):
        write_script(_WrongOutput(), folder / name, torch.zeros(1, 3, 9, 64, 64))


def _no_torchscript(folder: Path) -> None:
    for name in ("encoder.jit", "decoder.jit"):
        torch.save({"weight": torch.zeros(3)}, folder / name)


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights of another rate": (_other_rate, "not those of the 4x8x8 network"),
    "another compression factor": (_other_factor, "8x8x8, but 4x8x8 was asked for"),
    "truncated safetensors": (_truncated, "not a readable safetensors file"),
    "corrupt safetensors": (_corrupt, "not a readable safetensors file"),
    "outputs of the wrong shape": (_wrong_outputs, "not the half of a discrete video tokenizer"),
    "no TorchScript": (_no_torchscript, "not a readable TorchScript file"),
}


@pytest.mark.parametrize("case", CASES)
def test_preparation_refuses(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, sentence = CASES[case]
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    spoil(tokenizer)
    frames = torch.randint(0, 255, (3, 9, 32, 48), dtype=torch.uint8)
    (tmp_path / "videos").mkdir()
    write_mp4(tmp_path / "videos" / "a.mp4", frames, fps=24)
    arguments = ["--input_videos_dir", tmp_path / "videos", "--output_prefix", tmp_path / "out"]
    arguments += ["--width", 48, "--height", 32, "--num_context_frames", 9]
    arguments += ["--tokenizer_compression_factor", "4,8,8", "--encoder_path", tokenizer]
    arguments += ["--decoder_path", tokenizer]
    code, message = run_here("prepare_dataset.py", arguments, monkeypatch, capsys)
    assert code == 2
    assert message.startswith("error: ") and message.count("\n") == 1
    assert sentence in message and str(tokenizer) in message


def test_inference_refuses_a_corrupt_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _truncated(tmp_path)
    video = tmp_path / "a.mp4"
    write_mp4(video, torch.randint(0, 255, (3, 9, 32, 48), dtype=torch.uint8), fps=24)
    arguments = ["--input_image_or_video_path", video, "--ar_model_dir", "random:tiny"]
    arguments += ["--encoder_path", tmp_path, "--decoder_path", tmp_path, "--width", 48]
    arguments += ["--height", 32, "--num_context_frames", 9, "--num_input_frames", 5]
    arguments += ["--tokenizer_compression_factor", "4,8,8"]
    arguments += ["--video_save_name", tmp_path / "out.mp4", "--disable_diffusion_decoder"]
    code, message = run_here("infer.py", arguments, monkeypatch, capsys)
    assert code == 2
    assert message.count("\n") == 1 and "not a readable safetensors file" in message


def test_values_outside_the_range_are_refused_with_the_fix(tmp_path: Path) -> None:
    write_native(tmp_path, small_network())
    tokenizer = load_tokenizer(tmp_path, device="cpu")
    video = random_video(1, 3, 5, 16, 16)
    pixels = ((video + 1) * 127.5).round()
    pixels[0, 0, 0, 0, :2] = torch.tensor([0.0, 255.0])
    with pytest.raises(TokenizerError, match=r"\[0, 255\].*divide 8-bit pixels by 127.5"):
        tokenizer.encode(pixels)
    video[0, 1, 2, 3, 4] = float("nan")
    with pytest.raises(TokenizerError, match="NaN"):
        tokenizer.encode(video)
    video[0, 1, 2, 3, 4] = 1.1
    with pytest.raises(TokenizerError, match=r"1\.1\]"):
        tokenizer.encode(video)


def test_a_rounding_over_the_range_is_taken(tmp_path: Path) -> None:
    write_native(tmp_path, small_network())
    tokenizer = load_tokenizer(tmp_path, device="cpu")
    video = torch.ones(1, 3, 5, 16, 16, dtype=torch.bfloat16)
    after_one = torch.tensor(1.0078125, dtype=torch.bfloat16)
    assert after_one > 1
    tokenizer.encode(video * after_one)
    tokenizer.encode(-video * after_one)


def test_torchscript_that_is_fixed_to_one_size_is_refused_at_another(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        """Right at the size that the probe has, as a trace with its sizes baked in."""

        def forward(self, video: Tensor) -> Tensor:
            return video[:, 0, ::4, ::8, ::8].int()[:, :3, :8, :8]

    write_script(Fixed(), tmp_path / "encoder.jit", torch.zeros(1, 3, 9, 64, 64))
    encoder = ScriptEncoder(tmp_path / "encoder.jit", torch.device("cpu"), None)
    assert encoder.encode(torch.zeros(1, 3, 9, 64, 64)).shape == (1, 3, 8, 8)
    with pytest.raises(TokenizerError, match="cannot take clips of this size"):
        encoder.encode(torch.zeros(1, 3, 9, 64, 128))


def _change_config(folder: Path, **changes: object) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(values))


def _change_weight(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.conv_in.0.conv3d.weight"
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


UNUSABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "weights that are not a number": (
        lambda folder: _change_weight(folder, lambda t: t * float("nan")),
        "infinite or not a number",
    ),
    "quantised weights": (
        lambda folder: _change_weight(folder, lambda t: t.to(torch.int8)),
        "has the int8 tensor",
    ),
    "a negative width": (
        lambda folder: _change_config(folder, channels=-4),
        "channels is -4, it must be positive",
    ),
    "a width that is no number": (
        lambda folder: _change_config(folder, channels_mult=[1, "two"]),
        "it must be a list of whole numbers",
    ),
    "more tokens than int32 has": (
        lambda folder: _change_config(folder, levels=[2**16] * 3),
        "more tokens than int32",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_folders_are_refused(case: str, tmp_path: Path) -> None:
    spoil, sentence = UNUSABLE[case]
    write_native(tmp_path, small_network())
    spoil(tmp_path)
    with pytest.raises(TokenizerError, match=sentence) as error:
        load_tokenizer(tmp_path, device="cpu")
    assert "\n" not in str(error.value)


def test_torchscript_beside_a_config_of_another_rate_is_refused(tmp_path: Path) -> None:
    export_torchscript(small_network("dv4x8x8"), tmp_path)
    assert load_tokenizer(tmp_path, device="cpu").compression.name == "4x8x8"
    write_native(tmp_path, small_network("dv8x8x8"))
    (tmp_path / "model.safetensors").unlink()
    for native in (None, True, False):
        with pytest.raises(TokenizerError, match=r"by 4x8x8, but the config\.json .* says 8"):
            load_tokenizer(tmp_path, device="cpu", native=native)


def test_what_is_no_tensor_is_refused_and_every_integer_dtype_decodes(tmp_path: Path) -> None:
    write_native(tmp_path, small_network())
    tokenizer = load_tokenizer(tmp_path, device="cpu")
    with pytest.raises(TokenizerError, match="the video is a ndarray"):
        tokenizer.encode(random_video(1, 3, 5, 16, 16).numpy())
    with pytest.raises(TokenizerError, match="the token grid is a list"):
        tokenizer.decode([[[[1]]]])
    grid = torch.arange(8).reshape(1, 2, 2, 2)
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        assert torch.equal(tokenizer.decode(grid.to(dtype)), tokenizer.decode(grid))
