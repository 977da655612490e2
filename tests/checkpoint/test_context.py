"""``context/data.json``: typed in memory, the same bytes on disk; damaged, one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.contracts import data_of, make_tokenizer

from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.context import SplitInfo, TrainingData
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.files import write_json
from cosmos_posttrain.models.presets import preset

# As the first version of this package wrote it.
RECORDED: dict[str, Any] = {
    "contract": {
        "format_version": 1,
        "kind": "base",
        "tokenizer": {
            "id": "codes",
            "sha256": "c" * 64,
            "compression": [4, 8, 8],
            "levels": [100],
            "vocab_size": 100,
        },
        "clip": {"num_frames": 9, "height": 16, "width": 24},
        "latent_shape": [3, 2, 3],
        "seq_length": 18,
        "dtype": "uint16",
        "text_encoder": None,
        "context_len": None,
    },
    "dataset": "f" * 64,
    "split": {"split_string": "98,1,1", "seed": 1234},
}


def _checkpoint(folder: Path, recorded: Any) -> Path:
    (folder / "weights").mkdir(parents=True)
    context.write_context(folder, preset("tiny"))
    write_json(folder / "context" / "data.json", recorded)
    return folder


TRANSFERRED = {**RECORDED, "embedding_transfer": {"init": "mean", "old_vocab_size": 64}}
WITHOUT_MANIFEST = {**RECORDED, "contract": None}


@pytest.mark.parametrize("recorded", [RECORDED, TRANSFERRED, WITHOUT_MANIFEST])
def test_what_was_recorded_is_written_again_byte_by_byte(
    recorded: dict[str, Any], tmp_path: Path
) -> None:
    source = open_source(_checkpoint(tmp_path / "first", recorded))
    assert source.data is not None and source.data.split == SplitInfo("98,1,1", 1234)
    assert source.contract is source.data.contract
    context.write_context(tmp_path / "second", source.config, source.data)
    first, second = (tmp_path / n / "context" / "data.json" for n in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_the_contract_is_typed() -> None:
    data = TrainingData.from_json(RECORDED, "data.json")
    assert data == data_of(make_tokenizer("codes", 100))
    assert data.contract is not None and data.contract.geometry.latent_shape == (3, 2, 3)


def test_what_an_older_version_did_not_record() -> None:
    short = {key: RECORDED["contract"][key] for key in RECORDED["contract"]}
    del short["text_encoder"], short["context_len"]
    data = TrainingData.from_json({"contract": short, "from_the_future": 1}, "data.json")
    assert data.contract == TrainingData.from_json(RECORDED, "data.json").contract
    assert (data.dataset, data.split, data.embedding_transfer) == (None, None, None)
    assert TrainingData.from_json({}, "data.json") == TrainingData()


def _change(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(recorded: dict[str, Any]) -> None:
        for key in path[:-1]:
            recorded = recorded[key]
        recorded[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_change("contract", value=[1]), r"contract is \[1\]"),
        (_change("contract", value={}), "it has no clip"),
        (_change("contract", "tokenizer", value="codes"), "tokenizer is 'codes'"),
        (_change("contract", "tokenizer", "vocab_size", value="100"), "vocab_size is '100'"),
        (_change("contract", "latent_shape", value=[3, 2]), r"its latent_shape is \[3, 2\]"),
        (_change("contract", "seq_length", value=17), "is not 17 tokens"),
        (_change("contract", "format_version", value=2), "its format_version is 2"),
        (_change("split", "seed", value="x"), "seed is 'x'"),
        (_change("dataset", value=1), "dataset is 1"),
    ],
)
def test_a_damaged_record_is_one_sentence(
    change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    recorded = json.loads(json.dumps(RECORDED))
    change(recorded)
    folder = _checkpoint(tmp_path / "model", recorded)
    with pytest.raises(CheckpointError, match=said) as error:
        open_source(folder)
    sentence = str(error.value)
    assert "data.json" in sentence and sentence.endswith("; restore the checkpoint.")
    assert "\n" not in sentence and sentence.count(". ") == 0
