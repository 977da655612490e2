"""Paths that hold no usable model: one sentence each, nothing executed."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.golden_ar import case_dir

from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.context import find_checkpoint
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.errors import CheckpointError, ConfigError, UserError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.presets import preset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copied = tmp_path / "model"
    copied.mkdir()
    for name in ("model.pt", "config.json"):
        shutil.copyfile(case_dir("base_4b_like") / name, copied / name)
    return copied


def _refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(path)


def test_a_truncated_file(folder: Path) -> None:
    data = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(data[: len(data) // 2])
    _refused(folder, "damaged, truncated")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_code_in_a_pickle_is_not_executed(folder: Path, save: Any) -> None:
    save({"model.norm.weight": _Bomb(folder / "executed")}, folder / "model.pt")
    # A bare pickle cannot be mapped into memory, so it is refused before anything is read.
    _refused(folder, "not executed|damaged")
    assert not (folder / "executed").exists()


def test_all_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    state = dict(torch.load(folder / "model.pt", weights_only=True))
    num_rows = len(state["model.output.weight"])
    del state["model.norm.weight"], state["model.layers.1.attention.wk.weight"]
    state["model.extra.weight"] = torch.zeros(2)
    state["model.output.weight"] = torch.zeros(3, 96)
    torch.save(state, folder / "model.pt")
    with pytest.raises(CheckpointError) as error:
        load_model(folder)
    for words in (
        "model.norm.weight",
        "model.layers.1.attention.wk.weight",
        "surplus model.extra.weight",
        f"model.output.weight of shape (3, 96) instead of ({num_rows}, 96)",
    ):
        assert words in str(error.value)


def test_configs_that_are_missing_damaged_or_of_another_model(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values)[:50])
    _refused(folder, "not JSON")
    del values["dim"]
    (folder / "config.json").write_text(json.dumps(values))
    _refused(folder, "dim")
    (folder / "config.json").unlink()
    _refused(folder, "no config.json")


def test_foreign_and_missing_folders(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    _refused(tmp_path, "holds no model")
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "absent")
    with pytest.raises(ConfigError, match="no model size '7B'"):
        open_source("random:7B")


def _checkpoint(run: Path, name: str) -> Path:
    folder = run / "default" / "checkpoints" / name
    (folder / "weights").mkdir(parents=True)
    context.write_context(folder, preset("tiny"))
    return folder


def test_find_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path) is None
    older = _checkpoint(tmp_path, "epoch=0-step=9")
    newest = _checkpoint(tmp_path, "epoch=1-step=100")
    incomplete = tmp_path / "default" / "checkpoints" / "epoch=1-step=200"
    incomplete.mkdir()
    for run in (tmp_path, tmp_path / "default", tmp_path / "default" / "checkpoints"):
        assert find_checkpoint(run) == newest
    assert find_checkpoint(older) == older
    assert find_checkpoint(older.with_name("epoch=7-step=9")) == older
    assert find_checkpoint(older.with_name("epoch=0-step=10")) is None
    assert find_checkpoint(incomplete) is None
    assert context.completed_steps(newest) == 101
    assert context.checkpoint_name(1, 101) == newest.name
    assert open_source(older.with_name("epoch=7-step=9")).path == older


def test_fresh_weights_take_any_grid_and_vocabulary() -> None:
    source = open_source("random:tiny")
    assert source.is_fresh and source.contract is None and source.files() == []
    larger = LatentShape(5, 24, 40)
    moved = source.at_grid(larger, "yarn", vocab_size=64)
    # They know no grid, so nothing is scaled.
    assert moved.config == preset("tiny", 64, larger)
    assert source.at_grid(None).config == source.config == preset("tiny")
    with pytest.raises(ConfigError, match="no rope_scaling 'linear'"):
        source.at_grid(larger, "linear")


def test_a_checkpoint_keeps_its_vocabulary_at_another_grid(tmp_path: Path) -> None:
    source = open_source(_checkpoint(tmp_path, "epoch=0-step=9"))
    assert not source.is_fresh and len(source.files()) == 1
    larger = LatentShape(5, 24, 20)
    moved = source.at_grid(larger, "interpolate", vocab_size=64)
    assert moved.config == preset("tiny").at_grid(larger, "interpolate")
    assert (moved.path, moved.format) == (source.path, source.format)
    assert source.at_grid(None, vocab_size=64) == source
