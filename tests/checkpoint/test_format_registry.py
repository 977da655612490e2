"""A format is one file and one entry in the registry: nothing else knows which formats exist."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR

from cosmos_posttrain.checkpoint import convert as conversion
from cosmos_posttrain.checkpoint import mapping
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.formats import registry
from cosmos_posttrain.checkpoint.formats.base import Contents, WritableFormat
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.checkpoint.weights import ReferenceWeights, WholeWeights
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.files import write_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.reference_config import to_reference

CONFIG = ModelConfig(2, 32, 4, 2, 12, 48, 100, LatentShape(2, 2, 3))
FORMATS_DIR = REPOSITORY_DIR / "cosmos_posttrain" / "checkpoint" / "formats"


class FolderFormat(WritableFormat):
    """A format of its own: one file a tensor, and the model's numbers in ``numbers.json``."""

    name = "folder"
    title = "a folder of tensors"
    parts = ("*.tensor", "numbers.json")

    def detect(self, folder: Path) -> Path | None:
        return folder if (folder / "numbers.json").is_file() else None

    def config(self, checkpoint: Path, named: ModelConfig | None) -> ModelConfig:
        values = json.loads((checkpoint / "numbers.json").read_text())
        return named or ModelConfig.from_json(values)

    def files(self, checkpoint: Path) -> list[Path]:
        return sorted(checkpoint.glob("*.tensor"))

    def open(self, checkpoint: Path, config: ModelConfig) -> WholeWeights:
        state = {p.stem: torch.load(p, weights_only=True) for p in self.files(checkpoint)}
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        dtypes = {name: tensor.dtype for name, tensor in state.items()}
        return ReferenceWeights(state.__getitem__, shapes, dtypes, config, str(checkpoint))

    def write(self, folder: Path, contents: Contents) -> None:
        for name, tensor in contents.weights.reference():
            torch.save(tensor.clone(), folder / f"{name}.tensor")
        write_json(folder / "numbers.json", contents.config.to_json())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = mapping.reference_shapes(CONFIG)
    state = {n: torch.randn(s, generator=generator).bfloat16() for n, s in shapes.items()}
    torch.save(state, folder / "model.pt")
    write_json(folder / "config.json", to_reference(CONFIG))
    return folder


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> FolderFormat:
    form = FolderFormat()
    monkeypatch.setattr(registry, "FORMATS", (form, *registry.FORMATS))
    monkeypatch.setitem(registry.WRITABLE, form.name, form)
    # The choices of --target_format were taken from the registry when the config was defined.
    monkeypatch.setattr(conversion, "validate", lambda config, world_size: None)
    return form


def test_a_new_format_is_read_written_and_overwritten(
    source: Path, registered: FolderFormat, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    convert(CheckpointConversionConfig(str(source), str(target), "folder", verify=True))
    assert open_source(target / "numbers.json").format is registered
    assert open_source(target).config == CONFIG
    before, after = load_model(source), load_model(target)
    pairs = zip(before.module.parameters(), after.module.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    # Its files are known as parts of a checkpoint, so another format may replace them.
    settings = CheckpointConversionConfig(str(source), str(target), "pt", overwrite=True)
    (target / "conversion.json").unlink()
    convert(settings)
    assert {p.name for p in target.iterdir()} == {"model.pt", "config.json", "conversion.json"}
    with pytest.raises(
        CheckpointError, match=r"neither a folder of tensors, nor .*, nor model\.pt"
    ):
        open_source(tmp_path)


def _compared_names(path: Path) -> Iterator[str]:
    """Formats' names that a file compares something with."""
    names = {form.name for form in registry.FORMATS}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and part.value in names:
                    yield f"{path.name}:{node.lineno} {part.value}"


def test_no_other_file_compares_names_of_formats() -> None:
    package = REPOSITORY_DIR / "cosmos_posttrain"
    files = [path for path in package.rglob("*.py") if FORMATS_DIR not in path.parents]
    assert len(files) > 100
    assert [found for path in files for found in _compared_names(path)] == []


def test_a_compared_name_is_found(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text('if kind in ("pt", "x") or kind == "other":\n    name = "nemo"\n')
    assert list(_compared_names(path)) == ["module.py:1 pt"]


def test_names_and_parts_are_those_of_one_format_each() -> None:
    names = [form.name for form in registry.FORMATS]
    assert len(set(names)) == len(names) and set(registry.WRITABLE) < set(names)
    for form in registry.FORMATS:
        described = (FORMATS_DIR / f"{form.name}.py").read_text()
        assert described.startswith(f'"""``{form.name}``')
