"""NeMo contexts that say less than everything: the tensors' shapes tell the rest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cosmos_posttrain.checkpoint import mapping, nemo_context
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.files import write_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig, YarnConfig
from cosmos_posttrain.models.reference_config import to_reference

YARN = YarnConfig(LatentShape(3, 2, 3), beta_fast=5.0)
BASE = ModelConfig(2, 32, 4, 2, 12, 48, 100, LatentShape(5, 2, 3), yarn=YARN)
TEXT = ModelConfig(2, 32, 4, 2, 12, 48, 128, LatentShape(2, 2, 3), context_dim=20, context_len=8)
# What the tensors' shapes tell.
SHAPES = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "crossattn_emb_size",
)


def _nemo(folder: Path, config: ModelConfig) -> Path:
    source = folder / "pt"
    source.mkdir()
    shapes = mapping.reference_shapes(config)
    torch.save({n: torch.zeros(s).bfloat16() for n, s in shapes.items()}, source / "model.pt")
    write_json(source / "config.json", to_reference(config))
    convert(CheckpointConversionConfig(str(source), str(folder / "nemo"), "nemo"))
    shutil.rmtree(folder / "nemo" / "context")
    (folder / "nemo" / "context").mkdir()
    return folder / "nemo"


def _values(config: ModelConfig, *left_out: str) -> dict[str, Any]:
    return {k: v for k, v in nemo_context.values_of(config).items() if k not in left_out}


def _write_yaml(nemo: Path, tree: Any) -> None:
    (nemo / "context" / "model.yaml").write_text(yaml.safe_dump(tree))


def _as_is(values: dict[str, Any]) -> Any:
    return {"_target_": "program.nemo.CosmosModel", "config": {"_target_": "a.B", **values}}


def _nested(values: dict[str, Any]) -> Any:
    """Other objects around it, which name numbers of their own."""
    config = {"_target_": "their.own.Config", **values}
    optimizer = {"_target_": "an.Optimizer", "config": {"lr": 1e-4, "hidden_size": None}}
    tokenizer = {"_target_": "a.NullTokenizer", "vocab_size": 7}
    task = {"tokenizer": tokenizer, "optim": optimizer, "wrapped": [{"inner": config}]}
    return {"_target_": "some.Task", "data": {"seq_length": 99, "num_workers": 2}, "task": task}


@pytest.mark.parametrize("shape", [_as_is, _nested])
@pytest.mark.parametrize("config", [BASE, TEXT], ids=["base", "video2world"])
def test_yaml_without_sizes(
    config: ModelConfig, shape: Callable[[dict[str, Any]], Any], tmp_path: Path
) -> None:
    nemo = _nemo(tmp_path, config)
    _write_yaml(nemo, shape(_values(config, *SHAPES)))
    assert open_source(nemo).config == config


@pytest.mark.parametrize("config", [BASE, TEXT], ids=["base", "video2world"])
def test_fiddle_without_sizes_and_with_other_classes(config: ModelConfig, tmp_path: Path) -> None:
    nemo = _nemo(tmp_path, config)
    nemo_context.write(nemo, config)
    (nemo / "context" / "model.yaml").unlink()
    path = nemo / "context" / "io.json"
    tree = json.loads(path.read_text().replace("Cosmos", "Their").replace("cosmos_", "no_such_"))
    for item in tree["objects"].values():
        gone = [f"Attr(name='{name}')" for name in SHAPES]
        item["items"] = [pair for pair in item["items"] if pair[0] not in gone]
    tokenizer = {"items": [["Attr(name='vocab_size')", 7]], "metadata": None}
    tree["objects"] = {"null_tokenizer_1": tokenizer, **tree["objects"]}
    path.write_text(json.dumps(tree))
    assert open_source(nemo).config == config


def test_the_two_files_complete_each_other(tmp_path: Path) -> None:
    nemo = _nemo(tmp_path, BASE)
    nemo_context.write(nemo, BASE)
    path = nemo / "context" / "io.json"
    tree = json.loads(path.read_text())
    for item in tree["objects"].values():
        item["items"] = [pair for pair in item["items"] if "rotary_base" in pair[0]]
    path.write_text(json.dumps(tree))
    _write_yaml(nemo, _as_is({**_values(BASE), "rotary_base": 1.0}))
    assert open_source(nemo).config == BASE  # io.json is believed first


@pytest.mark.parametrize("rows", [TEXT.vocab_size, TEXT.input_vocab_size])
def test_a_vocabulary_with_and_without_its_special_tokens(rows: int, tmp_path: Path) -> None:
    nemo = _nemo(tmp_path, TEXT)
    _write_yaml(nemo, _as_is({**_values(TEXT, "output_layer_vocab_size"), "vocab_size": rows}))
    assert open_source(nemo).config == TEXT


def test_what_is_stated_counts_before_the_shapes(tmp_path: Path) -> None:
    """So that a folder with the wrong weights is refused, not believed."""
    nemo = _nemo(tmp_path, BASE)
    _write_yaml(nemo, _as_is({**_values(BASE, *SHAPES), "num_layers": 3}))
    source = open_source(nemo)
    assert source.config.num_layers == 3
    with pytest.raises(CheckpointError, match=r"of shape \(2, .* instead of \(3, "):
        source.open_weights()


@pytest.mark.parametrize("tree", [{"config": None}, {"_target_": "a.B", "tokenizer": None}, {}])
def test_a_context_that_says_nothing(tree: Any, tmp_path: Path) -> None:
    """As where the original program made the config itself."""
    nemo = _nemo(tmp_path, BASE)
    _write_yaml(nemo, tree)
    with pytest.raises(CheckpointError, match="does not say its video_latent_shape") as error:
        open_source(nemo)
    assert "give --model_config" in str(error.value)
    named = open_source(nemo, str(tmp_path / "pt" / "config.json"))
    assert named.config == BASE and named.open_weights().num_bytes > 0


def test_yaml_without_a_bottom(tmp_path: Path) -> None:
    nemo = _nemo(tmp_path, BASE)
    (nemo / "context" / "model.yaml").write_text("model: " + "[" * 3000 + "]" * 3000)
    with pytest.raises(CheckpointError, match="is not YAML"):
        open_source(nemo)


def test_mappings_are_the_outer_ones_first() -> None:
    tree: dict[str, Any] = {"a": [{"b": {"c": {}}}, 1], "d": {"e": 2}}
    tree["a"].append(tree)  # as an anchor in YAML may
    assert list(nemo_context._mappings(tree)) == [
        tree,
        {"e": 2},
        {"b": {"c": {}}},
        {"c": {}},
        {},
    ]
