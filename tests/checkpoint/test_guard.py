"""Files with code in them: refused in one sentence, and nothing is executed."""

from __future__ import annotations

import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.megatron_checkpoint import save_with_megatron
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from cosmos_posttrain.checkpoint import context, dist, guard
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.checkpoint.torch_dist import TorchDistWriter
from cosmos_posttrain.checkpoint.torch_dist_weights import disk_key
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.presets import preset


class _Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model("random:tiny", seed=3)


@pytest.fixture
def checkpoint(model: Any, tmp_path: Path) -> Path:
    """As Megatron writes it."""
    folder = tmp_path / "default" / "checkpoints" / "epoch=0-step=9"
    (folder / "weights").mkdir(parents=True)
    save_with_megatron(folder / "weights", model.module)
    context.write_context(folder, model.config)
    return folder


def _refused(checkpoint: Path, model: Any, sentence: str) -> None:
    """By everything that opens a torch_dist folder."""
    with pytest.raises(CheckpointError, match=sentence):
        dist.load(checkpoint / "weights", model.module)
    with pytest.raises(CheckpointError, match=sentence):
        load_model(checkpoint)


def test_what_megatron_writes_is_read(checkpoint: Path, model: Any) -> None:
    metadata = guard.read_metadata(checkpoint / "weights")
    assert "module.output_layer.weight" in metadata.state_dict_metadata
    source = open_source(checkpoint)
    parameters = dict(source.open_weights().all_megatron())
    assert torch.equal(parameters["output_layer.weight"], model.module.output_layer.weight)


def test_an_index_of_megatron_core_0_15_is_read(checkpoint: Path, model: Any) -> None:
    """With its own classes and their own field, as in every checkpoint of NeMo 2."""
    from megatron.core.dist_checkpointing.strategies.torch import MCoreMetadata, MCoreSavePlan

    plan = MCoreSavePlan.__new__(MCoreSavePlan)
    plan.__dict__.update(items=[], storage_data=None, planner_data={}, mcore_data={"a": {}})
    index = MCoreMetadata.__new__(MCoreMetadata)
    index.__dict__.update(vars(guard.read_metadata(checkpoint / "weights")))
    index.__dict__.update(mcore_data={"a": {"shape": (1, 2)}}, all_local_plans=[plan])
    (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps(index))
    dist.load(checkpoint / "weights", model.module)
    found = load_model(checkpoint).module.output_layer.weight
    assert torch.equal(found, model.module.output_layer.weight)


@pytest.mark.parametrize("where", ["whole", "inside", "attribute"])
def test_code_in_the_index(checkpoint: Path, model: Any, tmp_path: Path, where: str) -> None:
    index = checkpoint / "weights" / ".metadata"
    bomb = _Call(Path.touch, tmp_path / "executed")
    metadata = guard.read_metadata(checkpoint / "weights")
    if where == "inside":
        metadata.planner_data = {"x": bomb}
    elif where == "attribute":
        metadata.something_else = bomb
    index.write_bytes(pickle.dumps(bomb if where == "whole" else metadata))
    _refused(checkpoint, model, "holds more than tables.*not executed")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(CheckpointError, match="not executed"):
        convert(CheckpointConversionConfig(str(checkpoint), str(tmp_path / "target"), "pt"))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "call",
    [
        _Call(os.system, "true"),
        _Call(eval, "1"),
        _Call(getattr, Path, "touch"),
        _Call(getattr, Metadata, "__init__"),
        _Call(subprocess.run, ["true"]),
        _Call(torch.load, "x"),
        _Call(torch.hub.load, "x"),
        _Call(__import__, "os"),
    ],
    ids=lambda call: f"{call.call[0].__module__}.{call.call[0].__name__}",
)
def test_functions_that_an_index_may_not_name(tmp_path: Path, call: _Call) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, {"x": call}, {})))
    with pytest.raises(CheckpointError, match="is not allowed"):
        guard.read_metadata(tmp_path)


def test_code_in_the_common_file(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    bomb = _Call(Path.touch, tmp_path / "executed")
    torch.save({"x": bomb}, checkpoint / "weights" / "common.pt")
    _refused(checkpoint, model, "common.pt holds more than tensors and plain values and was not")
    assert not (tmp_path / "executed").exists()


def test_code_instead_of_a_tensor(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    (folder / "weights").mkdir(parents=True)
    context.write_context(folder, model.config)
    bomb = tmp_path / "bomb.pt"
    torch.save(_Call(Path.touch, tmp_path / "executed"), bomb)
    writer = TorchDistWriter(folder / "weights")
    for name, tensor in open_source(_saved(model, tmp_path)).open_weights().all_megatron():
        key, layer = disk_key(name)
        writer.add(key, tensor, layer, model.config.num_layers)
    writer.finish()
    with (folder / "weights" / "__0_0.distcp").open("r+b") as file:
        file.write(bomb.read_bytes())  # over the first tensor, the embedding
    with pytest.raises(CheckpointError, match=r"damaged|not executed"):
        convert(CheckpointConversionConfig(str(folder), str(tmp_path / "target"), "pt"))
    assert not (tmp_path / "executed").exists() and not (tmp_path / "target").exists()


def _saved(model: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    (folder / "weights").mkdir(parents=True)
    dist.save(folder / "weights", model.module)
    context.write_context(folder, model.config)
    return folder


def test_an_object_where_a_tensor_belongs(checkpoint: Path, model: Any, tmp_path: Path) -> None:
    """torch would unpickle it without a guard, because the index says that it is an object."""
    weights = checkpoint / "weights"
    torch.save(_Call(Path.touch, tmp_path / "executed"), weights / "bomb.distcp")
    size = (weights / "bomb.distcp").stat().st_size
    metadata = guard.read_metadata(weights)
    for key in ("module.output_layer.weight", "module.decoder.layers.mlp.linear_fc1.weight"):
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        place = filesystem._StorageInfo("bomb.distcp", 0, size)
        metadata.storage_data[MetadataIndex(key)] = place
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    _refused(checkpoint, model, "pickled object instead of a tensor")
    with pytest.raises(CheckpointError, match="pickled object instead of a tensor"):
        convert(CheckpointConversionConfig(str(checkpoint), str(tmp_path / "target"), "pt"))
    assert not (tmp_path / "executed").exists()


def test_a_path_out_of_the_folder(checkpoint: Path, model: Any) -> None:
    metadata = guard.read_metadata(checkpoint / "weights")
    next(iter(metadata.storage_data.values())).relative_path = "../../secret"
    (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps(metadata))
    _refused(checkpoint, model, "points outside its folder")


@pytest.mark.parametrize("damage", [b"", b"\x80\x04", b"not a pickle", b"\x80\x05K\x01."])
def test_a_damaged_index(checkpoint: Path, model: Any, damage: bytes) -> None:
    (checkpoint / "weights" / ".metadata").write_bytes(damage)
    _refused(checkpoint, model, "damaged|not a torch_dist index")


def test_a_missing_common_file(model: Any, tmp_path: Path) -> None:
    checkpoint = _saved(model, tmp_path)
    (checkpoint / "weights" / "common.pt").unlink()
    with pytest.raises(CheckpointError, match=r"common\.pt is missing"):
        dist.load(checkpoint / "weights", model.module)


def _with_common_object(weights: Path, values: Any) -> None:
    """As megatron-core from 0.19 on writes it: an object among the pieces, and no common.pt."""
    torch.save(values, weights / "common.distcp")
    metadata = guard.read_metadata(weights)
    metadata.state_dict_metadata[guard.COMMON_OBJECT] = BytesStorageMetadata()
    size = (weights / "common.distcp").stat().st_size
    place = filesystem._StorageInfo("common.distcp", 0, size)
    metadata.storage_data[MetadataIndex(guard.COMMON_OBJECT)] = place
    (weights / ".metadata").write_bytes(pickle.dumps(metadata))
    (weights / "common.pt").unlink(missing_ok=True)


def test_common_values_in_an_object(model: Any, tmp_path: Path) -> None:
    weights = _saved(model, tmp_path) / "weights"
    _with_common_object(weights, [{"step": 3}])
    assert guard.read_common(weights) == {"step": 3}
    dist.load(weights, model.module)


def test_code_in_the_common_object(model: Any, tmp_path: Path) -> None:
    weights = _saved(model, tmp_path) / "weights"
    _with_common_object(weights, [{"x": _Call(Path.touch, tmp_path / "executed")}])
    with pytest.raises(CheckpointError, match=r"common_state.* and was not executed"):
        dist.load(weights, model.module)
    assert not (tmp_path / "executed").exists()


def test_a_common_object_without_its_file(model: Any, tmp_path: Path) -> None:
    weights = _saved(model, tmp_path) / "weights"
    _with_common_object(weights, [{}])
    (weights / "common.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"common\.distcp is missing"):
        guard.read_common(weights)


def test_tiny_is_what_the_fixture_saved(checkpoint: Path) -> None:
    assert open_source(checkpoint.with_name("epoch=3-step=9")).config == preset("tiny")
