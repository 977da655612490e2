"""Every accepted form of a tokenizer, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from test_tokenizer_network import random_video, small_network

from cosmos_posttrain.errors import ConfigError, GeometryError, TokenizerError
from cosmos_posttrain.geometry import Compression
from cosmos_posttrain.tokenizer import SHIPPED, load_tokenizer, load_tokenizer_pair
from cosmos_posttrain.tokenizer.export import export_torchscript, import_torchscript
from cosmos_posttrain.tokenizer.weights_io import write_native


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    write_native(folder, small_network())
    return folder


@pytest.fixture(scope="module")
def script_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("script")
    export_torchscript(small_network(), folder)
    return folder


def test_native_folder(native_folder: Path) -> None:
    tokenizer = load_tokenizer(native_folder, device="cpu")
    assert tokenizer.compression == Compression(4, 8, 8)
    assert tokenizer.levels == (8, 5, 5)
    assert tokenizer.vocab_size == 200
    assert tokenizer.dtype == torch.float32
    assert tokenizer.id == str(native_folder)
    indices = tokenizer.encode(random_video(2, 3, 9, 32, 48))
    assert indices.shape == (2, 3, 4, 6) and indices.dtype == torch.int32
    assert indices.unique().numel() > 20
    video = tokenizer.decode(indices)
    assert video.shape == (2, 3, 9, 32, 48)
    assert video.abs().max() <= 1


def test_image_is_a_clip_of_one_frame(native_folder: Path) -> None:
    tokenizer = load_tokenizer(native_folder, device="cpu")
    video = random_video(1, 3, 5, 32, 32)
    image = tokenizer.encode(video[:, :, :1])
    assert image.shape == (1, 1, 4, 4)
    assert torch.equal(image, tokenizer.encode(video)[:, :1])
    assert tokenizer.decode(image).shape == (1, 3, 1, 32, 32)


def test_torchscript_gives_the_same_indices_video_and_hash(
    native_folder: Path, script_folder: Path
) -> None:
    native = load_tokenizer(native_folder, device="cpu")
    for path in (script_folder, script_folder / "encoder.jit", script_folder / "decoder.jit"):
        script = load_tokenizer(path, device="cpu")
        assert script.compression == native.compression
        assert script.levels == native.levels
        assert script.sha256 == native.sha256
    for shape in ((1, 3, 17, 32, 48), (3, 3, 1, 16, 8)):  # neither is the traced size
        video = random_video(*shape)
        indices = native.encode(video)
        assert torch.equal(script.encode(video), indices)
        torch.testing.assert_close(script.decode(indices), native.decode(indices))


def test_export_runs_without_this_package(script_folder: Path) -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore'); import torch\n"
        f"encoder = torch.jit.load(r'{script_folder / 'encoder.jit'}')\n"
        f"decoder = torch.jit.load(r'{script_folder / 'decoder.jit'}')\n"
        "indices, codes, loss = encoder(torch.zeros(1, 3, 9, 24, 16))\n"
        "assert indices.shape == (1, 3, 3, 2) and indices.dtype == torch.int32\n"
        "assert codes.shape == (1, 3, 3, 3, 2)\n"
        "assert decoder(indices).shape == (1, 3, 9, 24, 16)\n"
        "assert 'cosmos_posttrain' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


def test_export_runs_in_another_dtype(script_folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        encoder, decoder = (
            torch.jit.load(script_folder / f"{half}.jit").to(torch.bfloat16)
            for half in ("encoder", "decoder")
        )
    indices, codes, _ = encoder(torch.zeros(1, 3, 9, 16, 16, dtype=torch.bfloat16))
    assert codes.dtype == decoder(indices).dtype == torch.bfloat16


def test_torchscript_comes_back_as_native(script_folder: Path) -> None:
    network, original = import_torchscript(script_folder), small_network()
    video = random_video(1, 3, 9, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.encode(video), original.encode(video))
        assert torch.equal(network(video), original(video))


def test_hash_is_of_the_encoder_alone_and_of_every_value(tmp_path: Path) -> None:
    network = small_network()
    hashes = []
    for name in ("decoder.conv_in.0", "quant_conv", "encoder.conv_in.1"):
        with torch.no_grad():
            network.get_submodule(name).conv3d.bias[0] += 0.25  # type: ignore[union-attr,index]
        write_native(tmp_path, network)
        hashes.append(load_tokenizer(tmp_path, device="cpu").sha256)
    write_native(tmp_path, small_network())
    original = load_tokenizer(tmp_path, device="cpu").sha256
    assert hashes[0] == original
    assert len({original, *hashes[1:]}) == 3


def test_half_precision_file_computes_in_float32_on_the_cpu(tmp_path: Path) -> None:
    write_native(tmp_path, small_network(), torch.bfloat16)
    assert load_tokenizer(tmp_path, device="cpu").dtype == torch.float32
    half = load_tokenizer(tmp_path, device="cpu", dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    video = half.decode(half.encode(random_video(1, 3, 5, 16, 16)))
    assert video.dtype == torch.bfloat16


def test_encoder_and_decoder_from_two_places(native_folder: Path, script_folder: Path) -> None:
    mixed = load_tokenizer_pair(native_folder, script_folder / "decoder.jit", "4,8,8", "cpu")
    native = load_tokenizer(native_folder, device="cpu")
    indices = native.encode(random_video(1, 3, 5, 16, 16))
    torch.testing.assert_close(mixed.decode(indices), native.decode(indices))


def test_halves_of_two_rates_are_refused(native_folder: Path, tmp_path: Path) -> None:
    write_native(tmp_path, small_network("dv8x16x16"))
    with pytest.raises(TokenizerError, match="4x8x8 and the decoder's 8x16x16"):
        load_tokenizer_pair(native_folder, tmp_path, device="cpu")


def test_swapped_torchscript_halves_are_refused(script_folder: Path, tmp_path: Path) -> None:
    shutil.copy(script_folder / "decoder.jit", tmp_path / "encoder.jit")
    shutil.copy(script_folder / "encoder.jit", tmp_path / "decoder.jit")
    with pytest.raises(TokenizerError, match="encoder"):
        load_tokenizer(tmp_path, device="cpu")


@pytest.mark.parametrize("output", ["video", "video[:, 0]", "video[:, 0].int()[:, :1, :1]"])
def test_torchscript_with_outputs_of_the_wrong_shape_is_refused(
    tmp_path: Path, output: str
) -> None:
    class Wrong(torch.nn.Module):
        def forward(self, video: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = eval(output)
            return result

    traced = torch.jit.trace(Wrong(), torch.zeros(1, 3, 9, 64, 64))
    torch.jit.save(traced, tmp_path / "encoder.jit")
    torch.jit.save(traced, tmp_path / "decoder.jit")
    with pytest.raises(TokenizerError, match="returns"):
        load_tokenizer(tmp_path, device="cpu")


def test_another_compression_than_asked_for_is_refused(native_folder: Path) -> None:
    with pytest.raises(TokenizerError, match=r"4x8x8, but 8x8x8 was asked for"):
        load_tokenizer(native_folder, device="cpu", compression="8,8,8")


def test_weights_of_another_rate_are_refused(native_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(native_folder, tmp_path, dirs_exist_ok=True)
    values = json.loads((tmp_path / "config.json").read_text())
    values["temporal_compression"] = 2
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(TokenizerError, match="not those of the 2x8x8 network"):
        load_tokenizer(tmp_path, device="cpu")


def test_damaged_files_are_refused(
    native_folder: Path, script_folder: Path, tmp_path: Path
) -> None:
    for folder, name in ((native_folder, "model.safetensors"), (script_folder, "encoder.jit")):
        broken = tmp_path / name
        shutil.copytree(folder, broken)
        (broken / name).write_bytes((folder / name).read_bytes()[:1000])
        with pytest.raises(TokenizerError, match="not a readable"):
            load_tokenizer(broken, device="cpu")


def test_paths_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no tokenizer")
    for path, message in (
        (tmp_path / "absent", "does not exist"),
        (tmp_path, "holds neither"),
        (tmp_path / "notes.txt", "is not a tokenizer"),
        ("tiny", "needs a compression factor"),
    ):
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(path, device="cpu")
    with pytest.raises(TokenizerError, match="no tiny tokenizer of 4x4x4"):
        load_tokenizer("tiny", compression="4,4,4")
    with pytest.raises(ConfigError, match="there is no dtype 'int8'"):
        load_tokenizer("tiny", compression="4,8,8", dtype="int8")


def test_input_that_cannot_be_encoded_is_refused(native_folder: Path) -> None:
    tokenizer = load_tokenizer(native_folder, device="cpu")
    video = random_video(1, 3, 5, 16, 16)
    for bad, message in (
        (video * 3, r"must be in \[-1, 1\]"),
        (video * float("nan"), r"in \[-1, 1\]"),
        ((video * 127).to(torch.uint8), "takes floats"),
        (video[0], "shape"),
        (video[:0], "empty"),
    ):
        with pytest.raises(TokenizerError, match=message):
            tokenizer.encode(bad)
    for shape in ((1, 3, 4, 16, 16), (1, 3, 5, 20, 16)):
        with pytest.raises(GeometryError, match="use"):
            tokenizer.encode(random_video(*shape))


def test_indices_that_cannot_be_decoded_are_refused(native_folder: Path) -> None:
    tokenizer = load_tokenizer(native_folder, device="cpu")
    grid = torch.zeros(1, 2, 2, 2, dtype=torch.int64)
    assert tokenizer.decode(grid).shape == (1, 3, 5, 16, 16)
    for bad in (grid + 200, grid - 1, grid.float(), grid[0], grid[:0]):
        with pytest.raises(TokenizerError):
            tokenizer.decode(bad)


def test_importing_the_room_does_not_import_torch() -> None:
    code = "import sys, cosmos_posttrain.tokenizer; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", SHIPPED.values())
def test_shipped_names_load(name: str) -> None:
    tokenizer = load_tokenizer(name, device="cpu")
    assert f"tiny-dv{tokenizer.compression.name}" == name == tokenizer.id
    assert 1000 <= tokenizer.vocab_size <= 1024
    same = load_tokenizer("tiny", device="cpu", compression=tokenizer.compression)
    assert same.id == name and same.sha256 == tokenizer.sha256
