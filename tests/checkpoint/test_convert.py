"""convert_checkpoint.py: its output folder's rules, dtypes, the contract, damaged sources."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.contracts import data_of, make_tokenizer
from helpers.distributed_run import REPOSITORY_DIR, run_script
from helpers.full_disk import no_file_beyond

from cosmos_posttrain.checkpoint import context, mapping
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.formats import registry
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.checkpoint.target_folder import TargetFolder
from cosmos_posttrain.errors import CheckpointError, ConfigError, OutputFolderError
from cosmos_posttrain.files import write_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.reference_config import to_reference

# A vocabulary of 100 needs padding to 128 in Megatron's form, and none in the reference's.
CONFIG = ModelConfig(2, 32, 4, 2, 12, 48, 100, LatentShape(2, 2, 3))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in mapping.reference_shapes(CONFIG).items()
    }
    torch.save(state, folder / "model.pt")
    write_json(folder / "config.json", to_reference(CONFIG))
    return folder


def _convert(source: Path, target: Path, form: str, **options: Any) -> None:
    convert(CheckpointConversionConfig(str(source), str(target), form, **options))


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_bfloat16_and_the_contract_survive(source: Path, tmp_path: Path) -> None:
    first, second, back = (tmp_path / name for name in ("first", "second", "back"))
    _convert(source, first, "megatron", verify=True)
    data = data_of(make_tokenizer("codes", 100))
    context.write_context(first, CONFIG, data)
    _convert(first, second, "megatron", verify=True)
    assert open_source(second).data == data
    name = Path("context", "data.json")
    assert (second / name).read_bytes() == (first / name).read_bytes()
    assert open_source(second).config == CONFIG
    _convert(second, back, "pt", verify=True)
    before, after = (torch.load(f / "model.pt", weights_only=True) for f in (source, back))
    assert list(after) == list(mapping.reference_shapes(CONFIG))
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, after[k]) for k, t in before.items())
    # No tensor drags the storage of a whole stack of layers along.
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in after.values())
    assert open_source(back).config == CONFIG
    assert _names(tmp_path) == {"source", "first", "second", "back"}


def test_output_folder_rules(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    _convert(source, target, "pt")
    written = (target / "model.pt").stat().st_mtime_ns
    _convert(source, target, "pt")
    assert "nothing to do" in capsys.readouterr().out
    assert (target / "model.pt").stat().st_mtime_ns == written
    with pytest.raises(OutputFolderError, match="to pt that differs"):
        _convert(source, target, "megatron")
    os.utime(source / "model.pt", (1, 1))
    with pytest.raises(OutputFolderError, match="differs from this one"):
        _convert(source, target, "pt")
    _convert(source, target, "pt", overwrite=True)
    (target / "config.json").unlink()
    with pytest.raises(OutputFolderError, match="changed or removed"):
        _convert(source, target, "pt")
    (target / "mine.txt").write_text("kept")
    _convert(source, target, "megatron", overwrite=True)
    assert _names(target) == {"mine.txt", "weights", "context", "conversion.json"}
    assert open_source(target).format.name == "megatron"


def test_folders_that_are_never_touched(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("three years")
    with pytest.raises(OutputFolderError, match="something else"):
        _convert(source, other, "pt")
    for target in (source, source.parent):
        with pytest.raises(OutputFolderError, match="holds the source"):
            _convert(source, target, "pt", overwrite=True)
    with pytest.raises(OutputFolderError, match="is a file"):
        _convert(source, other / "thesis.tex", "pt")
    assert _names(other) == {"thesis.tex"}
    assert _names(source) == {"model.pt", "config.json"}


def test_a_damaged_source_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    megatron = tmp_path / "megatron"
    _convert(source, megatron, "megatron")
    for part in (megatron / "weights").glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        _convert(megatron, tmp_path / "target", "pt")
    assert _names(tmp_path) == {"source", "megatron"}


def test_settings_that_do_not_fit(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--source is missing; --target is missing; --target_f"):
        convert(CheckpointConversionConfig())
    everything = r"--target_format gguf is not one of .*; --max_shard_gb -1\.0 must be above 0; --s"
    with pytest.raises(ConfigError, match=everything):
        convert(CheckpointConversionConfig(target_format="gguf", max_shard_gb=-1.0))
    with pytest.raises(CheckpointError, match="no files to convert"):
        convert(CheckpointConversionConfig("random:tiny", str(tmp_path / "t"), "pt"))


def test_the_script_exits_with_2_in_one_sentence(source: Path, tmp_path: Path) -> None:
    arguments = ["--source", source, "--target", tmp_path / "t", "--target_format"]
    finished = run_script(["convert_checkpoint.py", *arguments, "gguf"])
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    finished = run_script(["convert_checkpoint.py", *arguments, "pt", "--verify"])
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "25 tensors" in finished.stdout  # 11 in each of 2 layers, and 3


@pytest.mark.parametrize(
    ("form", "writer"),
    [
        ("pt", "pt_file.PtWriter"),
        ("safetensors", "safetensors_file.SafetensorsWriter"),
        ("megatron", "torch_dist.TorchDistWriter"),
    ],
)
def test_verify_finds_one_changed_bit(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, writer: str
) -> None:
    module, name = writer.split(".")
    kind = getattr(importlib.import_module(f"cosmos_posttrain.checkpoint.{module}"), name)
    real_add = kind.add

    def add_damaged(self: Any, name: str, tensor: torch.Tensor, *rest: Any) -> None:
        if name.endswith(("model.norm.weight", "final_layernorm.weight")):
            tensor = tensor.clone()
            tensor.view(torch.uint8)[3] ^= 1
        real_add(self, name, tensor, *rest)

    monkeypatch.setattr(kind, "add", add_damaged)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight differs"):
        _convert(source, tmp_path / "target", form, verify=True)
    assert _names(tmp_path) == {"source"}


def test_a_target_of_one_form_replaces_another(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    convert(CheckpointConversionConfig(str(source), str(target), "safetensors", max_shard_gb=1e-5))
    assert len(list(target.glob("*.safetensors"))) > 2
    assert (target / "README.md").is_file()
    (target / "notes.md").write_text("mine")
    _convert(source, target, "nemo", overwrite=True)
    assert _names(target) == {"weights", "context", "conversion.json", "notes.md"}
    _convert(source, target, "nemo")
    (target / "weights" / "common.pt").unlink()
    with pytest.raises(OutputFolderError, match="changed or removed"):
        _convert(source, target, "nemo")


def test_a_disk_that_is_too_small(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OutputFolderError, match="are free in"):
        _convert(source, tmp_path / "new" / "target", "pt")
    assert _names(tmp_path) == {"source"}


def test_verify_compares_what_is_there_already(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    _convert(source, target, "pt")
    _convert(source, target, "pt", verify=True)
    state = torch.load(source / "model.pt", weights_only=True)
    bits = state["model.norm.weight"].view(torch.uint8).numpy().tobytes()
    data = bytearray((target / "model.pt").read_bytes())
    data[data.index(bits) + 3] ^= 1
    (target / "model.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight differs.*--overwrite"):
        _convert(source, target, "pt", verify=True)


def test_other_settings_are_another_conversion(source: Path, tmp_path: Path) -> None:
    shards, named = tmp_path / "shards", tmp_path / "named"
    _convert(source, shards, "safetensors")
    with pytest.raises(OutputFolderError, match="differs from this one"):
        _convert(source, shards, "safetensors", max_shard_gb=1e-3)
    values = json.loads((source / "config.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps({**values, "rope_theta": 1000.0}))
    _convert(source, named, "pt")
    with pytest.raises(OutputFolderError, match="differs from this one"):
        _convert(source, named, "pt", model_config=str(tmp_path / "other.json"))


def test_a_link_to_a_folder(source: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    _convert(source, tmp_path / "link", "pt")
    assert (tmp_path / "link").is_symlink()
    assert _names(tmp_path / "real") == {"model.pt", "config.json", "conversion.json"}


def test_a_mounted_volume(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be renamed to, and what is beside it lies on another disk."""
    volume = tmp_path / "volume"
    volume.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)
    real = Path.replace

    def replace(path: Path, target: Path) -> Path:
        if volume in (target, target.parent) and volume not in path.parents:
            raise OSError(18, "Invalid cross-device link")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", replace)
    (volume / ".tmp-0-volume" / "new").mkdir(parents=True)  # of a conversion that was killed
    _convert(source, volume, "megatron")
    assert _names(volume) == {"weights", "context", "conversion.json"}
    _convert(source, volume, "pt", overwrite=True)
    assert _names(volume) == {"model.pt", "config.json", "conversion.json"}


def test_a_target_that_cannot_be_written(source: Path) -> None:
    with pytest.raises(OutputFolderError, match="cannot be written"):
        _convert(source, source / "model.pt" / "target", "pt")


@pytest.mark.parametrize("form", registry.WRITABLE)
@pytest.mark.parametrize("num_bytes", [60, 5000, 30000], ids=["at-once", "early", "late"])
def test_a_disk_that_becomes_full(source: Path, tmp_path: Path, form: str, num_bytes: int) -> None:
    """The largest file has 76 kB: one sentence, and what was in the target before stays."""
    target = tmp_path / "target"
    _convert(source, target, "pt")
    before = {path: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(OutputFolderError) as error, no_file_beyond(num_bytes):
        _convert(source, target, form, overwrite=True)
    said = str(error.value)
    assert said.startswith(f"{target} cannot be written (") and "make room" in said
    assert "\n" not in said
    assert {path: path.read_bytes() for path in target.iterdir()} == before
    assert _names(tmp_path) == {"source", "target"}


_WRITER = """
import sys
from pathlib import Path
from cosmos_posttrain.checkpoint.target_folder import TargetFolder

target, origin = map(Path, sys.argv[1:])
with TargetFolder(target, origin).replacing({}, overwrite=False) as folder:
    (folder / "part").write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_trace(
    source: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    command = [sys.executable, "-c", _WRITER, str(target), str(source)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY_DIR)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as first:
        assert first.stdout is not None and first.stdout.readline() == "writing\n"
        for overwrite in (False, True):
            with pytest.raises(OutputFolderError, match="is being written by another process") as e:
                _convert(source, target, "pt", overwrite=overwrite)
            assert str(e.value).startswith(f"{target} is")
        _convert(source, tmp_path / "beside", "pt")  # another target in the same folder is free
        first.kill()
    assert _names(tmp_path) == {"source", "beside", ".tmp-0-target"}
    _convert(source, target, "pt")
    assert _names(tmp_path) == {"source", "beside", "target"}
    assert _names(target) == {"model.pt", "config.json", "conversion.json"}


def test_what_another_process_wrote_in_the_meantime_stays(source: Path, tmp_path: Path) -> None:
    target = TargetFolder(tmp_path / "target", source)
    assert not target.is_complete({}, overwrite=False)
    _convert(source, tmp_path / "target", "pt")
    with (
        pytest.raises(OutputFolderError, match="by another process in the meantime"),
        target.replacing({}, overwrite=False),
    ):
        pass
    assert _names(tmp_path / "target") == {"model.pt", "config.json", "conversion.json"}
    assert _names(tmp_path) == {"source", "target"}
