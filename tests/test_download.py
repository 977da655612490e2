"""Downloads from a hub on this machine, through huggingface_hub itself."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import hub_server
from helpers.distributed_run import run_script

from cosmos_posttrain import files
from cosmos_posttrain.checkpoint import mapping
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert as convert_here
from cosmos_posttrain.download import RECIPES, DownloadConfig, download, validate, verify, wanted
from cosmos_posttrain.errors import ConfigError, OutputFolderError, UserError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.reference_config import to_reference

CONFIG = ModelConfig(1, 32, 4, 2, 12, 48, 100, LatentShape(2, 2, 3))
MODEL, TOKENIZER, TEXT = "acme/model", "acme/tokenizer", "acme/t5"


def _model_files() -> dict[str, bytes]:
    state = {name: torch.ones(shape) for name, shape in mapping.reference_shapes(CONFIG).items()}
    file = io.BytesIO()
    torch.save(state, file)
    config = json.dumps(to_reference(CONFIG)).encode()
    other = {"nemo/weights/metadata.json": b"{}", "README.md": b"# Model", "LICENSE": b"free"}
    return {"model.pt": file.getvalue(), "config.json": config, **other}


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    tokenizer = {"encoder.jit": b"e" * 5000, "decoder.jit": b"d" * 5000, "mean_std.pt": b"x"}
    text = {"config.json": b"{}", "spiece.model": b"s" * 2000, "pytorch_model.bin": b"w" * 9000}
    text |= {"tf_model.h5": b"t" * 9000, "onnx/config.json": b"{}"}
    with hub_server.serve({MODEL: _model_files(), TOKENIZER: tokenizer, TEXT: text}) as server:
        yield server


def _run(hub: hub_server.Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "cosmos_posttrain.download", "--target", str(tmp_path / "all"), *arguments]
    return run_script(command, env=hub.environment(tmp_path / "home"))


def _wanted(hub: hub_server.Hub) -> tuple[str, ...]:
    return ("--models", MODEL, "--tokenizers", TOKENIZER, "--text_encoder", TEXT)


def test_everything_into_one_folder(hub: hub_server.Hub, tmp_path: Path) -> None:
    finished = _run(hub, tmp_path, *_wanted(hub))
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "all"
    held = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert held == {
        "SHA256SUMS",
        "download.json",
        *(f"{MODEL}/{name}" for name in ("model.pt", "config.json", "LICENSE")),
        *(f"{TOKENIZER}/{name}" for name in ("encoder.jit", "decoder.jit")),
        *(f"{TEXT}/{name}" for name in ("config.json", "spiece.model", "pytorch_model.bin")),
    }
    assert f"model        {folder / MODEL}" in finished.stdout
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    record = json.loads((folder / "download.json").read_text())["repositories"]
    assert {entry["commit"] for entry in record.values()} == {hub_server.COMMIT}
    assert (folder / MODEL / "model.pt").read_bytes() == hub.repositories[MODEL]["model.pt"]

    # Again: nothing is asked for. Then as on a cluster without a network.
    hub.requests.clear()
    assert _run(hub, tmp_path, *_wanted(hub)).returncode == 0
    assert hub.requests == []
    verify(folder)
    target = tmp_path / "megatron"
    arguments = ["--source", folder / MODEL, "--target", target, "--target_format", "megatron"]
    finished = run_script(["convert_checkpoint.py", *arguments], env={"HF_HUB_OFFLINE": "1"})
    assert finished.returncode == 0, finished.stderr


def test_damage_is_found_and_repaired(hub: hub_server.Hub, tmp_path: Path) -> None:
    hub.damaged = {f"{MODEL}/model.pt", f"{MODEL}/LICENSE"}
    for broken in ("model.pt", "LICENSE"):
        finished = _run(hub, tmp_path, *_wanted(hub))
        assert finished.returncode == 2
        assert f"{broken} arrived damaged" in finished.stderr, finished.stderr
        hub.damaged.discard(f"{MODEL}/{broken}")
    with pytest.raises(UserError, match=r"t(okenizer/)?.*was not downloaded"):
        verify(tmp_path / "all")
    assert _run(hub, tmp_path, *_wanted(hub)).returncode == 0

    folder = tmp_path / "all"
    (folder / MODEL / "config.json").unlink()
    encoder = folder / TOKENIZER / "encoder.jit"
    encoder.write_bytes(b"E" + encoder.read_bytes()[1:])
    finished = _run(hub, tmp_path, "--verify")
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert f"{MODEL}/config.json is missing; {TOKENIZER}/encoder.jit differs" in finished.stderr


def test_a_folder_has_one_writer_and_room_enough(
    hub: hub_server.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = DownloadConfig(str(tmp_path / "all"), models=MODEL)
    with files.locked(tmp_path / "all"), pytest.raises(OutputFolderError, match="being written"):
        download(config)
    free = SimpleNamespace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    monkeypatch.setattr("cosmos_posttrain.download._look_up", lambda *_: entry)
    entry = {"files": {"model.pt": {"size": 10**9, "sha256": None, "done": False}}}
    with pytest.raises(OutputFolderError, match=r"a/b needs 1\.000 GB, but only 0\.0"):
        download(DownloadConfig(str(tmp_path / "all"), models="a/b"))
    assert not (tmp_path / "all").exists()


def test_an_interrupted_download_goes_on(hub: hub_server.Hub, tmp_path: Path) -> None:
    hub.cut = {f"{TOKENIZER}/decoder.jit"}
    finished = _run(hub, tmp_path, *_wanted(hub))
    assert finished.returncode == 2 and "could not be downloaded" in finished.stderr
    assert not (tmp_path / "all" / "SHA256SUMS").exists()
    hub.cut.clear()
    hub.requests.clear()
    assert _run(hub, tmp_path, *_wanted(hub)).returncode == 0
    fetched = [
        request for request in hub.requests if request.startswith("GET") and "api" not in request
    ]
    # What was complete is not fetched again.
    assert not [request for request in fetched if "model.pt" in request or "encoder" in request]
    verify(tmp_path / "all")


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        ("acme/absent", "neither a local path nor a Hugging Face repository"),
        (f"{MODEL}@v9", "has no revision 'v9'"),
        (TOKENIZER, "holds no model that this package reads"),
    ],
)
def test_what_cannot_be_had(
    hub: hub_server.Hub, tmp_path: Path, wanted: str, sentence: str
) -> None:
    finished = _run(hub, tmp_path, "--models", wanted)
    assert finished.returncode == 2
    assert sentence in finished.stderr and finished.stderr.count("\n") == 1


@pytest.mark.slow
def test_ids_in_the_scripts(hub: hub_server.Hub, tmp_path: Path) -> None:
    """convert_checkpoint.py on an id: at a revision, gated, from the cache, offline."""

    def convert(target: str, source: str, **more: str) -> subprocess.CompletedProcess[str]:
        arguments = ["--source", source, "--target", tmp_path / target, "--target_format", "pt"]
        environment = {**hub.environment(tmp_path / "home"), **more}
        return run_script(["convert_checkpoint.py", *arguments], env=environment)

    finished = convert("missing", MODEL, HF_HUB_OFFLINE="1")
    assert finished.returncode == 2
    assert "not in the Hugging Face cache" in finished.stderr and finished.stderr.count("\n") == 1
    hub.gated = {MODEL}
    finished = convert("gated", MODEL)
    assert finished.returncode == 2
    assert "is gated" in finished.stderr and finished.stderr.count("\n") == 1
    finished = convert("there", f"{MODEL}@v1", HF_TOKEN=hub_server.TOKEN)
    assert finished.returncode == 0, finished.stderr
    # Only what is needed was fetched, and it is there without a network.
    assert not [request for request in hub.requests if "nemo" in request]
    finished = convert("cached", f"{MODEL}@{hub_server.COMMIT}", HF_HUB_OFFLINE="1")
    assert finished.returncode == 0, finished.stderr
    marker = json.loads((tmp_path / "cached" / "conversion.json").read_text())
    assert hub_server.COMMIT in marker["source"]

    # A repository without model.pt: its nemo folder is fetched.
    nemo = tmp_path / "nemo"
    convert_here(CheckpointConversionConfig(str(tmp_path / "there"), str(nemo), "nemo"))
    (nemo / "context" / "model.json").unlink()
    held = [path for path in nemo.rglob("*") if path.is_file()]
    hub.repositories["acme/nemo"] = {
        f"nemo/{path.relative_to(nemo)}": path.read_bytes() for path in held
    }
    finished = convert("from-nemo", "acme/nemo")
    assert finished.returncode == 0, finished.stderr
    first, second = (torch.load(tmp_path / n / "model.pt") for n in ("there", "from-nemo"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_model_sizes_as_the_original_names_them(hub: hub_server.Hub, tmp_path: Path) -> None:
    names = [f"nvidia/Cosmos-1.0-Autoregressive-{size}" for size in ("4B", "5B-Video2World")]
    tokenizer = hub.repositories[TOKENIZER]
    hub.repositories |= {name: _model_files() for name in names}
    hub.repositories["nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"] = tokenizer
    hub.repositories["google-t5/t5-11b"] = hub.repositories[TEXT]
    hub.repositories["nvidia/Cosmos-1.0-Guardrail"] = {
        "blocklist/custom/violence": b"word",
        "face_blur_filter/Resnet50_Final.pth": b"faces",
        "aegis/model.safetensors": b"large",
    }
    command = ["-m", "cosmos_posttrain.download", "--model_sizes", "4B", "5B"]
    command += ["--text_encoder", "google-t5/t5-11b"]
    finished = run_script(command, env=hub.environment(tmp_path / "home"), cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "checkpoints"
    held = {path.parent.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    assert {
        "Cosmos-1.0-Autoregressive-4B",
        "Cosmos-1.0-Autoregressive-5B-Video2World",
        "Cosmos-1.0-Tokenizer-DV8x16x16",
        "Cosmos-1.0-Guardrail/face_blur_filter",
        "google-t5/t5-11b",
    } <= held
    assert (folder / "Cosmos-1.0-Guardrail/blocklist/custom/violence").read_bytes() == b"word"
    assert not (folder / "Cosmos-1.0-Guardrail" / "aegis").exists()
    verify(folder)
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)


def test_settings(tmp_path: Path) -> None:
    sizes = DownloadConfig(model_sizes=["4B", "5B", "12B", "13B"])
    assert list(wanted(sizes).values()).count("model") == 4 and sizes.folder == "checkpoints"
    with pytest.raises(ConfigError, match=r"--model_sizes 7B is not one of 4B, 12B, 5B, 13B"):
        validate(DownloadConfig(model_sizes=["7B"]))
    for recipe in RECIPES:
        roles = list(wanted(DownloadConfig(str(tmp_path), recipe=recipe)).values())
        assert roles.count("model") == 1 and roles.count("tokenizer") == 2
        assert ("text encoder" in roles) == recipe.endswith("Video2World")
    with pytest.raises(ConfigError, match=r"--target is missing.*; nothing to download"):
        download(DownloadConfig())
    with pytest.raises(ConfigError, match=r"--recipe 5B is not one of 4B, .*; x is not an id"):
        validate(DownloadConfig(str(tmp_path), recipe="5B", models="x"))
    with pytest.raises(ConfigError, match=r"^--target is missing: name a folder\.$"):
        validate(DownloadConfig(verify=True))
    with pytest.raises(ConfigError, match="x is not an id"):
        download(DownloadConfig(str(tmp_path / "t"), models="x"))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="something else than a download"):
        download(DownloadConfig(str(tmp_path), models=MODEL))
    with pytest.raises(UserError, match=r"has no download\.json"):
        verify(tmp_path)


def test_a_target_that_cannot_be_written(hub: hub_server.Hub, tmp_path: Path) -> None:
    (tmp_path / "all").write_text("a file")
    finished = _run(hub, tmp_path, "--models", MODEL, "--target", str(tmp_path / "all" / "in"))
    assert (finished.returncode, finished.stdout) == (2, "")
    assert "cannot be written" in finished.stderr and finished.stderr.count("\n") == 1
