"""convert_checkpoint.py on damaged sources: one sentence, exit code 2, no partial output."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_script

import convert_checkpoint
from cosmos_posttrain.checkpoint import guard, mapping
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.files import write_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.reference_config import to_reference

CONFIG = ModelConfig(2, 32, 4, 2, 12, 48, 100, LatentShape(2, 2, 3))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    state = {n: torch.ones(shape) for n, shape in mapping.reference_shapes(CONFIG).items()}
    torch.save(state, folder / "model.pt")
    write_json(folder / "config.json", to_reference(CONFIG))
    return folder


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def _state(model: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(model / "model.pt", weights_only=True)
    return state


def _truncate(model: Path) -> None:
    data = (model / "model.pt").read_bytes()
    (model / "model.pt").write_bytes(data[: len(data) // 2])


def _put_code_in(model: Path) -> None:
    torch.save({"model.norm.weight": _Bomb(model.parent / "executed")}, model / "model.pt")


def _put_bare_code_in(model: Path) -> None:
    (model / "model.pt").write_bytes(pickle.dumps(_Bomb(model.parent / "executed")))


def _change_names_and_shapes(model: Path) -> None:
    state = dict(_state(model))
    del state["model.norm.weight"], state["model.layers.1.attention.wk.weight"]
    state |= {"model.more.weight": torch.zeros(2), "model.most.weight": torch.zeros(2)}
    state["model.output.weight"] = torch.zeros(3, 32)
    torch.save(state, model / "model.pt")


def _truncate_shards(model: Path) -> None:
    _in_form(model, "safetensors")
    shard = sorted(model.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])


def _lose_a_shard(model: Path) -> None:
    _in_form(model, "safetensors")
    sorted(model.glob("*.safetensors"))[1].unlink()


def _in_form(model: Path, form: str) -> None:
    options: Any = {"max_shard_gb": 2e-5}
    convert(CheckpointConversionConfig(str(model), str(model.parent / "other"), form, **options))
    for path in [model, model.parent / "other"]:
        path.rename(path.with_name(path.name + "-moved"))
    model.with_name("other-moved").rename(model)


def _nemo(model: Path) -> Path:
    _in_form(model, "nemo")
    for name in ("model.json", "data.json"):
        (model / "context" / name).unlink(missing_ok=True)
    return model


def _nemo_without_weights(model: Path) -> None:
    (_nemo(model) / "weights").rename(model.parent / "elsewhere")


def _nemo_with_empty_weights(model: Path) -> None:
    _nemo_without_weights(model)
    (model / "weights").mkdir()


def _nemo_in_zarr(model: Path) -> None:
    _nemo_with_empty_weights(model)
    array = model / "weights" / "module.output_layer.weight"
    array.mkdir()
    (array / ".zarray").write_text("{}")


def _nemo_of_other_shapes(model: Path) -> None:
    path = _nemo(model) / "context" / "model.yaml"
    (path.parent / "io.json").unlink()
    text = path.read_text().replace("ffn_hidden_size: 48", "ffn_hidden_size: 96")
    path.write_text(text.replace("num_layers: 2", "num_layers: 3"))


def _nemo_with_other_tensors(model: Path) -> None:
    weights = _nemo(model) / "weights"
    index = guard.read_metadata(weights)
    tensors = index.state_dict_metadata
    tensors["module.decoder.more.weight"] = tensors.pop("module.decoder.final_layernorm.weight")
    tensors["module.decoder.most.weight"] = tensors["module.decoder.more.weight"]
    (weights / ".metadata").write_bytes(pickle.dumps(index))


def _nemo_with_a_missing_file(model: Path) -> None:
    next((_nemo(model) / "weights").glob("*.distcp")).write_bytes(b"")


def _damaged_context(model: Path) -> None:
    path = _nemo(model) / "context" / "io.json"
    path.write_text(json.dumps({"objects": [1]}))


CASES: list[tuple[Callable[[Path], None], list[str]]] = [
    (_truncate, ["damaged, truncated"]),
    (_put_code_in, ["was not executed"]),
    (_put_bare_code_in, ["damaged, truncated"]),
    (
        _change_names_and_shapes,
        [
            "lacks model.layers.1.attention.wk.weight, model.norm.weight;",
            "has surplus model.more.weight, model.most.weight;",
            "has model.output.weight of shape (3, 32) instead of (100, 32)",
        ],
    ),
    (_truncate_shards, ["damaged, truncated"]),
    (_lose_a_shard, ["lacks model-00002"]),
    (_nemo_without_weights, ["NeMo checkpoint without weights/"]),
    (_nemo_with_empty_weights, ["holds no Megatron torch_dist weights"]),
    (_nemo_in_zarr, ["zarr", "scripts/convert_zarr_checkpoint.py"]),
    (
        _nemo_of_other_shapes,
        ["linear_fc1.weight of shape (2, 96, 32) instead of (3, 192, 32)", "(2, 32, 48)"],
    ),
    (
        _nemo_with_other_tensors,
        [
            "lacks module.decoder.final_layernorm.weight;",
            "has surplus module.decoder.more.weight, module.decoder.most.weight.",
        ],
    ),
    (_nemo_with_a_missing_file, ["is damaged"]),
    (_damaged_context, ["is not a configuration of NeMo's"]),
]


@pytest.mark.parametrize(
    ("damage", "words"), CASES, ids=lambda value: getattr(value, "__name__", "")
)
def test_one_sentence_and_no_output(
    damage: Callable[[Path], None],
    words: list[str],
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(model)
    before = {path.name for path in model.parent.iterdir()}
    capsys.readouterr()
    for form in ("megatron", "safetensors"):
        target = str(model.parent / "target")
        arguments = ["--source", str(model), "--target", target, "--target_format", form]
        monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            run_cli(convert_checkpoint.main)
        said = capsys.readouterr()
        assert stop.value.code == 2
        assert said.out == ""
        assert said.err.startswith("error: ") and said.err.count("\n") == 1
        assert said.err.rstrip().endswith(".")
        for word in words:
            assert word in said.err
    # Neither a target nor a temporary folder, and nothing was executed.
    assert {path.name for path in model.parent.iterdir()} == before


def test_the_script_itself(model: Path) -> None:
    _truncate(model)
    target = model.parent / "target"
    arguments = ["--source", model, "--target", target, "--target_format", "nemo"]
    finished = run_script(["convert_checkpoint.py", *arguments])
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1
    assert {path.name for path in model.parent.iterdir()} == {"model"}
