"""Checkpoints whose files contradict each other: one sentence, wherever they are read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos_posttrain.checkpoint import guard, mapping, nemo_context
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.errors import CheckpointError, GeometryError, UserError
from cosmos_posttrain.files import write_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig, YarnConfig
from cosmos_posttrain.models.reference_config import from_reference, to_reference

YARN = YarnConfig(LatentShape(1, 2, 3))
CONFIG = ModelConfig(2, 32, 4, 2, 12, 48, 100, LatentShape(2, 2, 3), yarn=YARN)
NORM = "module.decoder.final_layernorm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    state = {n: torch.ones(shape) for n, shape in mapping.reference_shapes(CONFIG).items()}
    torch.save(state, folder / "model.pt")
    write_json(folder / "config.json", to_reference(CONFIG))
    return folder


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    target = folder.with_name("checkpoint")
    convert(CheckpointConversionConfig(str(folder), str(target), "megatron"))
    return target


def _sentence(error: pytest.ExceptionInfo[Any]) -> str:
    said = str(error.value)
    assert "\n" not in said and said.endswith(".")
    return said


def _not_converted(source: Path, form: str) -> str:
    target = source.with_name("target")
    with pytest.raises(UserError) as error:
        convert(CheckpointConversionConfig(str(source), str(target), form))
    assert not any(source.parent.glob("*target*"))
    return _sentence(error)


def _change(folder: Path, **tensors: Any) -> None:
    state = torch.load(folder / "model.pt", weights_only=True)
    torch.save({**state, **tensors}, folder / "model.pt")


@pytest.mark.parametrize("form", ["pt", "megatron", "safetensors"])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(32, dtype=torch.int64),
        torch.zeros(32, dtype=torch.complex64),
        torch.zeros(32).to_sparse(),
        torch.zeros(32, device="meta"),
    ],
    ids=["int64", "complex64", "sparse", "meta"],
)
def test_tensors_that_are_no_weights(folder: Path, tensor: torch.Tensor, form: str) -> None:
    _change(folder, **{"model.norm.weight": tensor})
    assert "holds model.norm.weight in a form that is not dense" in _not_converted(folder, form)
    with pytest.raises(CheckpointError, match="not dense"):
        load_model(folder)


def test_names_that_are_no_names(folder: Path) -> None:
    torch.save({1: torch.zeros(2)}, folder / "model.pt")
    assert "not a flat state dict" in _not_converted(folder, "megatron")


def test_dtypes_that_megatron_cannot_keep_apart(folder: Path) -> None:
    wq, norm = "model.layers.0.attention.wq.weight", "model.layers.1.ffn_norm.weight"
    shapes = mapping.reference_shapes(CONFIG)
    mixed = {name: torch.rand(shapes[name]).half() for name in (wq, norm)}
    _change(folder, **mixed)
    for form in ("megatron", "nemo"):
        said = _not_converted(folder, form)
        assert f"{wq} in torch.float16" in said and f"{norm} in torch.float16" in said
    target = folder.with_name("shards")
    convert(CheckpointConversionConfig(str(folder), str(target), "safetensors", verify=True))
    back = folder.with_name("back")
    convert(CheckpointConversionConfig(str(target), str(back), "pt"))
    state = torch.load(back / "model.pt", weights_only=True)
    for name, tensor in mixed.items():
        assert state[name].dtype == torch.float16 and torch.equal(state[name], tensor)


def test_any_byte_of_the_pickle_may_be_wrong(folder: Path) -> None:
    data = (folder / "model.pt").read_bytes()
    start = data.index(b"data.pkl")
    for offset in range(0, 400, 7):
        damaged = bytearray(data)
        damaged[start + offset] ^= 0x55
        (folder / "model.pt").write_bytes(damaged)
        try:
            load_model(folder)
        except CheckpointError as error:
            assert "\n" not in str(error)


def _edit_index(weights: Path, change: Callable[[Any], object]) -> None:
    index = guard.read_metadata(weights)
    change(index)
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def _replace_norm(weights: Path, value: Any) -> None:
    path = weights / "other.distcp"
    torch.save(value, path)

    def change(index: Any) -> None:
        for key, place in index.storage_data.items():
            if key.fqn == NORM:
                place.relative_path, place.offset = path.name, 0
                place.length = path.stat().st_size

    _edit_index(weights, change)


def _chunk(index: Any) -> Any:
    return index.state_dict_metadata[NORM].chunks[0]


# Converting and loading read through the same guards, so both say the same.
DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda w: _replace_norm(w, torch.ones(31)), "something else as"),
    (lambda w: _replace_norm(w, {"a": 1}), "something else as"),
    (lambda w: _replace_norm(w, Path), "was not executed"),
    (
        lambda w: _edit_index(w, lambda i: i.state_dict_metadata[NORM].chunks.clear()),
        f"lacks parts of {NORM}",
    ),
    (
        lambda w: _edit_index(w, lambda i: setattr(_chunk(i), "offsets", torch.Size([1, 2]))),
        "not a torch_dist index",
    ),
    (
        lambda w: _edit_index(w, lambda i: setattr(_chunk(i), "sizes", torch.Size([10**13]))),
        "lies outside it",
    ),
    (
        lambda w: _edit_index(w, lambda i: setattr(i, "storage_data", {"a": 1})),
        "not a torch_dist index",
    ),
    (
        lambda w: _edit_index(w, lambda i: setattr(i, "state_dict_metadata", None)),
        "not a torch_dist index",
    ),
    (lambda w: _edit_index(w, lambda i: i.storage_data.clear()), "missing or compressed pieces"),
]


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES)
def test_an_index_that_is_wrong(
    checkpoint: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    damage(checkpoint / "weights")
    assert sentence in _not_converted(checkpoint, "pt")
    with pytest.raises(CheckpointError) as error:
        load_model(checkpoint)
    assert sentence in _sentence(error)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "metadata.json is damaged"),
        ("[]", "metadata.json is damaged"),
        ('{"sharded_backend": "zarr"}', "is in Megatron's form 'zarr', not in torch_dist"),
    ],
)
def test_megatrons_own_note_of_the_format(checkpoint: Path, text: str, sentence: str) -> None:
    (checkpoint / "weights" / "metadata.json").write_text(text)
    with pytest.raises(CheckpointError) as error:
        load_model(checkpoint)
    assert sentence in _sentence(error)


def test_loading_names_every_tensor_that_does_not_fit(checkpoint: Path) -> None:
    def change(index: Any) -> None:
        tensors = index.state_dict_metadata
        tensors["module.decoder.more.weight"] = tensors.pop(NORM)
        tensors["module.more._extra_state"] = tensors["module.decoder.more.weight"]
        del tensors["module.output_layer.weight"]

    _edit_index(checkpoint / "weights", change)
    with pytest.raises(CheckpointError) as error:
        load_model(checkpoint)
    said = _sentence(error)
    assert f"lacks {NORM}, module.output_layer.weight;" in said
    assert "surplus module.decoder.more.weight." in said


@pytest.mark.parametrize("value", [None, "x", [], {}, [1], -1, float("nan")], ids=repr)
def test_values_of_another_kind_in_a_config(folder: Path, value: Any) -> None:
    values = to_reference(CONFIG)
    numbers = ["n_layers", "dim", "n_heads", "head_dim", "vocab_size", "rope_theta", "norm_eps"]
    for name in [*numbers, "video_latent_shape", "original_latent_shape", "yarn_scale"]:
        with pytest.raises(UserError):
            from_reference({**values, name: value})
    names = ["num_layers", "kv_channels", "rotary_base", "latent_shape", "params_dtype"]
    for name in names:
        with pytest.raises(UserError):
            ModelConfig.from_json({**CONFIG.to_json(), name: value})
    del values["yarn_beta_slow"]
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"config\.json lacks yarn_beta_slow\."):
        open_source(folder)


def test_numbers_without_end(folder: Path, tmp_path: Path) -> None:
    values = to_reference(CONFIG)
    for name in ("n_layers", "dim", "ffn_hidden_size", "vocab_size"):
        with pytest.raises(UserError, match="must be"):
            from_reference({**values, name: 10**20})
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "model.yaml").write_text("a: &x\n  - *x\n")
    assert nemo_context.read(tmp_path) == {}


def test_another_file_is_not_taken_for_the_model(folder: Path) -> None:
    other = folder / "older.pt"
    other.write_bytes((folder / "model.pt").read_bytes())
    with pytest.raises(CheckpointError, match=r"older\.pt is a file of another name"):
        open_source(other)
    assert open_source(folder / "model.pt").format.name == "pt"


def test_no_tokens_at_all(folder: Path) -> None:
    with pytest.raises(GeometryError, match=r"\(1, 0\).*at least one token"):
        load_model(folder).logits(torch.zeros(1, 0, dtype=torch.int64))
