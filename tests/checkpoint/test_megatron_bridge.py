"""Megatron-Bridge's folders: there and back, as another writer makes them, and bad ones."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.contracts import data_of, make_tokenizer
from megatron.core import dist_checkpointing

import convert_checkpoint
from cosmos_posttrain.checkpoint import context, mapping
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert, verify
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.nemo_context import values_of
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.files import write_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.models.config import ModelConfig, YarnConfig
from cosmos_posttrain.models.reference_config import to_reference

YARN = YarnConfig(LatentShape(3, 2, 3), beta_fast=5.0)
CONFIG = ModelConfig(2, 32, 4, 2, 12, 48, 100, LatentShape(5, 2, 3), yarn=YARN)
TEXT = ModelConfig(2, 32, 4, 2, 12, 48, 100, LatentShape(2, 2, 3), context_dim=20, context_len=8)
both = pytest.mark.parametrize("config", [CONFIG, TEXT], ids=["base", "video2world"])
# What Bridge tells Megatron when it saves with its defaults.
LAYOUT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def _make(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = mapping.reference_shapes(config)
    state = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    torch.save(state, folder / "model.pt")
    write_json(folder / "config.json", to_reference(config))
    return folder


def _convert(source: Path, target: Path, form: str, **options: Any) -> Path:
    convert(CheckpointConversionConfig(str(source), str(target), form, verify=True, **options))
    return target


def _compare(first: Path, second: Path) -> None:
    verify(open_source(first).open_weights(), open_source(second))


@both
def test_there_and_back(config: ModelConfig, tmp_path: Path) -> None:
    source = _convert(_make(tmp_path / "pt", config), tmp_path / "megatron", "megatron")
    data = data_of(make_tokenizer("big", config.vocab_size))
    context.write_data(source, data)
    bridge = _convert(source, tmp_path / "bridge", "megatron_bridge")
    for path in (bridge, bridge / "iter_0000000"):
        found = open_source(path)
        assert found.format is not None and found.format.name == "megatron_bridge"
        assert (found.path, found.config) == (bridge / "iter_0000000", config)
        assert found.data == data
    back = _convert(bridge, tmp_path / "back", "pt")
    before, after = (torch.load(f / "model.pt", weights_only=True) for f in (tmp_path / "pt", back))
    assert list(before) == list(after)
    assert all(t.dtype == after[n].dtype and torch.equal(t, after[n]) for n, t in before.items())


def test_files_are_those_that_bridge_looks_for(tmp_path: Path) -> None:
    bridge = _convert(_make(tmp_path / "pt", CONFIG), tmp_path / "bridge", "megatron_bridge")
    assert (bridge / "latest_checkpointed_iteration.txt").read_text() == "0"
    checkpoint = bridge / "iter_0000000"
    names = {path.name for path in checkpoint.iterdir() if path.suffix != ".distcp"}
    state = {".metadata", "common.pt", "metadata.json", "train_state.pt", "run_config.yaml"}
    assert names == state
    for path in (checkpoint / "train_state.pt", bridge / "latest_train_state.pt"):
        progress = torch.load(path, weights_only=True)
        assert progress["step"].item() == 0 and progress["step"].shape == ()
        assert not progress["do_train"].item()
    run = yaml.safe_load((checkpoint / "run_config.yaml").read_text())
    assert run["checkpoint"]["save_optim"] is False and run["checkpoint"]["save_rng"] is False
    assert run["model"]["tensor_model_parallel_size"] == 1
    assert run["model"]["num_layers"] == 2 and run["model"]["latent_shape"] == [5, 2, 3]
    assert run["model"]["params_dtype"] == {"_target_": "torch.bfloat16", "_call_": False}


# Both by Megatron 0.19's own call of torch's reader.
@pytest.mark.filterwarnings("ignore:The argument order of load:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.compat
@both
def test_megatron_reads_it_under_bridges_keys(config: ModelConfig, tmp_path: Path) -> None:
    source = _make(tmp_path / "pt", config, torch.float32)
    folder = str(_convert(source, tmp_path / "bridge", "megatron_bridge") / "iter_0000000")
    model = load_model(source).module
    expected = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    with cpu_device():
        common = dist_checkpointing.load_common_state_dict(folder)
        layout = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        assert layout == LAYOUT
        wanted = model.sharded_state_dict(metadata=layout)
        wanted = {key: value for key, value in wanted.items() if "_extra_state" not in key}
        loaded = dist_checkpointing.load({"model": wanted}, folder, strict="raise_unexpected")
    model.load_state_dict(loaded["model"])
    assert common["iteration"] == 0
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


@pytest.mark.compat
@pytest.mark.parametrize("layers", ["stacked", "single"])
@both
def test_a_run_of_another_program(config: ModelConfig, layers: str, tmp_path: Path) -> None:
    """Saved by Megatron, with a provider of its own and what a run has beside the weights."""
    source = _make(tmp_path / "pt", config, torch.float32)
    model = load_model(source)
    run = tmp_path / "run"
    for step in (20, 100):
        checkpoint = run / f"iter_{step:07d}"
        checkpoint.mkdir(parents=True)
        layout = LAYOUT | {"non_homogeneous_layers": layers == "single"}
        with cpu_device():
            state = {
                "checkpoint_version": 3.0,
                "iteration": step,
                "model": model.module.sharded_state_dict(metadata=layout),
                "opt_param_scheduler": {"max_lr": 1.0},
            }
            dist_checkpointing.save(state, str(checkpoint), content_metadata=layout)
        torch.save({"step": torch.tensor(step, dtype=torch.int32)}, checkpoint / "train_state.pt")
        _write_run_config(checkpoint, values_of(config))
    _point_to(run, 100)
    (run / "latest_train_state.pt").write_bytes((checkpoint / "train_state.pt").read_bytes())
    found = open_source(run)
    assert found.path == run / "iter_0000100"
    assert found.config == dataclasses.replace(config, params_dtype="float32")
    _compare(source, run)
    tokens, text = torch.arange(12).unsqueeze(0), None
    if config.is_video2world:
        tokens[0, 0], text = config.bov_token, torch.ones(1, 8, 20)
    assert torch.equal(load_model(run).logits(tokens, text), model.logits(tokens, text))


def _write_run_config(folder: Path, values: dict[str, Any], **sections: Any) -> None:
    provider = {
        "_target_": "their.program.Provider",
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "transformer_layer_spec": {"_target_": "os.abort"},
        "num_moe_experts": None,
        **values,
    }
    tree = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "checkpoint": {"_target_": "a.CheckpointConfig", "ckpt_format": "torch_dist"},
        "dataset": {"_target_": "a.Dataset", "seq_length": 7, "num_workers": 2},
        "model": provider,
        "peft": None,
        "tokenizer": {"_target_": "a.Tokenizer", "vocab_size": 7},
        **sections,
    }
    (folder / "run_config.yaml").write_text(yaml.safe_dump(tree))


def _point_to(run: Path, step: int) -> None:
    (run / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")


@pytest.fixture
def bridge(tmp_path: Path) -> Path:
    return _convert(_make(tmp_path / "pt", CONFIG), tmp_path / "bridge", "megatron_bridge")


def test_the_newest_where_no_file_names_it(bridge: Path) -> None:
    for step in (9, 10_000_000):
        shutil.copytree(bridge / "iter_0000000", bridge / f"iter_{step:07d}")
    (bridge / "iter_10000001").mkdir()  # of a run that was killed
    assert open_source(bridge).path == bridge / "iter_0000000"
    (bridge / "latest_checkpointed_iteration.txt").unlink()
    assert open_source(bridge).path == bridge / "iter_10000000"


@pytest.mark.parametrize("content", [b"\xff\xfe7", b"9" * 5000, b"release", b""])
def test_a_file_that_names_nothing(bridge: Path, content: bytes) -> None:
    expected = open_source(bridge).path
    tracker = bridge / "latest_checkpointed_iteration.txt"
    before = tracker.read_bytes()
    tracker.write_bytes(content)
    try:
        assert open_source(bridge).path == expected
    finally:
        tracker.write_bytes(before)


def test_shapes_tell_what_a_run_config_does_not_say(bridge: Path) -> None:
    checkpoint = bridge / "iter_0000000"
    values = values_of(CONFIG)
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "kv_channels")
    _write_run_config(checkpoint, {k: v for k, v in values.items() if k not in sizes})
    assert open_source(bridge).config == CONFIG
    _write_run_config(checkpoint, {})
    with pytest.raises(CheckpointError, match="does not say its video_latent_shape"):
        open_source(bridge)
    assert open_source(bridge, str(bridge.parent / "pt" / "config.json")).config == CONFIG


def test_a_run_beside_it_is_left_alone(bridge: Path, tmp_path: Path) -> None:
    """``--overwrite`` on a folder of Bridge's: its other iterations stay."""
    run = tmp_path / "run"
    shutil.copytree(bridge / "iter_0000000", run / "iter_0000100")
    _point_to(run, 100)
    _convert(bridge, run, "pt", overwrite=True)
    assert (run / "latest_checkpointed_iteration.txt").read_text() == "100\n"
    _convert(bridge, run, "megatron_bridge", overwrite=True)
    (run / "model.pt").unlink(missing_ok=True)
    assert open_source(run).path == run / "iter_0000000"
    assert open_source(run / "iter_0000100").config == CONFIG


def _not_yaml(checkpoint: Path) -> None:
    (checkpoint / "run_config.yaml").write_text("model: [")


def _without_model(checkpoint: Path) -> None:
    (checkpoint / "run_config.yaml").write_text("[1, 2]\n")


def _of_another_form(checkpoint: Path) -> None:
    saving = {"ckpt_format": "fsdp_dtensor"}
    _write_run_config(checkpoint, values_of(CONFIG), checkpoint=saving)


def _of_adapters(checkpoint: Path) -> None:
    _write_run_config(checkpoint, values_of(CONFIG), peft={"_target_": "a.LoRA", "dim": 8})


def _of_other_sizes(checkpoint: Path) -> None:
    _write_run_config(checkpoint, {**values_of(CONFIG), "num_layers": 3})


def _without_weights(checkpoint: Path) -> None:
    (checkpoint / ".metadata").unlink()


def _named_but_absent(checkpoint: Path) -> None:
    _point_to(checkpoint.parent, 500)


def _named_but_not_complete(checkpoint: Path) -> None:
    shutil.copytree(checkpoint, checkpoint.parent / "iter_0000500")
    (checkpoint.parent / "iter_0000500" / "run_config.yaml").unlink()
    _point_to(checkpoint.parent, 500)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_not_yaml, "is not YAML; copy it again"),
        (_without_model, "has no section model"),
        (_of_another_form, "in Megatron-Bridge's form fsdp_dtensor; save it there with"),
        (_of_adapters, "holds adapters without their model; merge them"),
        (_of_other_sizes, "of shape (2, 96, 32) instead of (3, 96, 32)"),
        (_without_weights, "holds no Megatron torch_dist weights"),
        (_named_but_absent, "names iter_0000500, which is not there or not complete"),
        (_named_but_not_complete, "names iter_0000500, which is not there or not complete"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_one_sentence(
    damage: Callable[[Path], None],
    words: str,
    bridge: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(bridge / "iter_0000000")
    target = bridge.parent / "target"
    arguments = ["--source", str(bridge), "--target", str(target), "--target_format", "pt"]
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_cli(convert_checkpoint.main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and not target.exists()
    assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith(".\n")
    assert words in said
