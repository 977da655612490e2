"""A tokenizer that the checkpoint names: no code of it runs unless the user or nvidia vouches."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from helpers import infer_case
from helpers.contracts import contract_of, make_tokenizer
from helpers.infer_case import TOKENIZER, random_config
from torch import Tensor, nn

from cosmos_posttrain import load_tokenizer
from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.inference.config import InferConfig
from cosmos_posttrain.inference.contract import check_tokenizer
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.tokenizer.export import export_torchscript
from cosmos_posttrain.tokenizer.loading import load_network
from cosmos_posttrain.tokenizer.weights_io import write_native

REPOSITORY = "nvidia/Some-Tokenizer"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Encoder(nn.Module):
    """Code of somebody's, with the published call signature."""

    def forward(self, video: Tensor) -> tuple[Tensor, Tensor]:
        print("code ran")
        b, _, t, h, w = video.shape
        return torch.zeros(b, 1 + (t - 1) // 8, h // 16, w // 16, dtype=torch.int32), video


class Decoder(nn.Module):
    def forward(self, indices: Tensor) -> Tensor:
        print("code ran")
        b, t, h, w = indices.shape
        return torch.zeros(b, 3, 1 + 8 * (t - 1), 16 * h, 16 * w)


def write_code(folder: Path) -> Path:
    folder.mkdir(parents=True)
    torch.jit.script(Encoder()).save(folder / "encoder.jit")
    torch.jit.script(Decoder()).save(folder / "decoder.jit")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ``REPOSITORY`` in an otherwise empty Hugging Face cache; tests are offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / f"models--{REPOSITORY.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def trained_config(folder: Path, name: str, **changes: str) -> InferConfig:
    """A run of a checkpoint that names its tokenizer so."""
    recorded = dataclasses.replace(infer_case.contract().tokenizer, id=name)
    infer_case.write_checkpoint(folder / "model", tokenizer=recorded)
    values = {"ar_model_dir": str(folder / "model"), "encoder_path": None, **changes}
    return random_config(folder / "in.mp4", folder, **values)


@pytest.mark.parametrize(
    "name",
    [
        "code",
        "./code",
        "code/encoder.jit",
        "{folder}/code",
        "{folder}/code/encoder.jit",
        "nvidia/code",  # a folder here, whoever made it
        "someone/else",
        "NVIDIA/Some-Tokenizer",
        "nvidia/Some-Tokenizer@refs/pr/1",  # proposed by anyone
        f"nvidia/Some-Tokenizer@{COMMIT}",
        "missing",
        "",
    ],
)
def test_what_could_run_code_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    cache: Path,
    name: str,
) -> None:
    for folder in (tmp_path / "code", tmp_path / "nvidia" / "code", cache):
        write_code(folder)
    monkeypatch.chdir(tmp_path)
    config = trained_config(tmp_path, name.format(folder=tmp_path))
    for changed in (config, dataclasses.replace(config, allow_tokenizer_mismatch=True)):
        sentence = "named by the checkpoint and not by you, .* name it with --encoder_path"
        with pytest.raises(TokenizerError, match=sentence) as caught:
            Session(changed)
        assert "\n" not in str(caught.value)
    assert "code ran" not in capfd.readouterr().out


def test_what_the_user_names_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = write_code(tmp_path / "code")
    with pytest.raises(TokenizerError, match=r"levels|tokens|other weights"):
        Session(trained_config(tmp_path, TOKENIZER, encoder_path=str(code)))
    assert "code ran" in capfd.readouterr().out


def test_the_hash_is_compared_before_anything_runs(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_code(cache)
    with pytest.raises(TokenizerError, match=r"has other weights.*--encoder_path"):
        Session(trained_config(tmp_path, REPOSITORY))
    assert "code ran" not in capfd.readouterr().out


def test_a_published_repository_with_the_recorded_weights_is_taken(
    tmp_path: Path, cache: Path
) -> None:
    export_torchscript(load_network(TOKENIZER), cache)
    session = Session(trained_config(tmp_path, REPOSITORY))
    assert session.tokenizer_info.id == REPOSITORY
    assert session.tokenizer_info.sha256 == load_tokenizer(TOKENIZER).sha256


def test_a_native_folder_is_taken_by_its_hash(tmp_path: Path) -> None:
    native = tmp_path / "native"
    network = load_network(TOKENIZER)
    write_native(native, network)
    write_code(tmp_path / "code")
    shutil.copy(tmp_path / "code" / "encoder.jit", native)  # beside it, never read
    config = trained_config(tmp_path, str(native))
    assert Session(config).tokenizer_info.id == str(native)
    with torch.no_grad():
        network.quant_conv.conv3d.weight += 1
    write_native(native, network)
    with pytest.raises(TokenizerError, match="has other weights"):
        Session(config)


def test_tokens_that_came_without_a_hash_are_compared_by_the_rest() -> None:
    known = contract_of(make_tokenizer("imported", 64, (8, 8)))
    unknown = dataclasses.replace(known, tokenizer=dataclasses.replace(known.tokenizer, sha256=""))
    check_tokenizer(unknown, make_tokenizer("a", 64, (8, 8)))
    with pytest.raises(TokenizerError, match="has other weights"):
        check_tokenizer(known, make_tokenizer("a", 64, (8, 8)))
    with pytest.raises(TokenizerError, match="has other weights"):
        check_tokenizer(unknown, make_tokenizer("a", 64, (4, 4, 4)))
