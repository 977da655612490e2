"""Every form in, every form out: bit-equal weights, equal logits, configs from foreign folders."""

from __future__ import annotations

import json
import shutil
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.golden_ar import CASES, LOGIT_TOLERANCE, case_dir, case_io, max_difference, weights
from safetensors.torch import load_file, save_file

from cosmos_posttrain.checkpoint import infer_config, mapping, nemo_context, torch_dist_weights
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.checkpoint.torch_dist import TorchDistReader, TorchDistWriter, write_index
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.files import write_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig, YarnConfig
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.models.reference_config import to_reference

YARN = YarnConfig(LatentShape(3, 2, 3), beta_fast=5.0)
CONFIG = ModelConfig(2, 32, 4, 2, 12, 48, 100, LatentShape(5, 2, 3), yarn=YARN)
TEXT = ModelConfig(2, 32, 4, 2, 12, 48, 100, LatentShape(2, 2, 3), context_dim=20, context_len=8)


def _convert(source: Path, target: Path, form: str, **options: Any) -> Path:
    convert(CheckpointConversionConfig(str(source), str(target), form, verify=True, **options))
    return target


def _make(folder: Path, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in mapping.reference_shapes(config).items()
    }
    torch.save(state, folder / "model.pt")
    write_json(folder / "config.json", to_reference(config))
    return folder


def _same(first: Path, second: Path) -> bool:
    before, after = (torch.load(f / "model.pt", weights_only=True) for f in (first, second))
    return list(before) == list(after) and all(
        t.dtype == after[k].dtype and torch.equal(t, after[k]) for k, t in before.items()
    )


def _only_nemos_own_context(folder: Path) -> None:
    """Leaves what a folder from NeMo itself has."""
    for name in ("model.json", "data.json"):
        (folder / "context" / name).unlink(missing_ok=True)


@pytest.mark.parametrize("name", CASES)
def test_golden_weights_and_logits_through_every_form(name: str, tmp_path: Path) -> None:
    nemo = _convert(case_dir(name), tmp_path / "nemo", "nemo")
    _only_nemos_own_context(nemo)
    assert open_source(nemo).format.name == "nemo"
    shards = _convert(case_dir(name), tmp_path / "shards", "safetensors", max_shard_gb=2e-4)
    assert len(list(shards.glob("*.safetensors"))) > 3
    io, before = case_io(name), weights(name)
    direct = load_model(case_dir(name)).logits(io["tokens"], io.get("context"))
    assert max_difference(direct, io["logits"]) <= LOGIT_TOLERANCE
    for folder in (nemo, shards):
        back = _convert(folder, tmp_path / f"{folder.name}-pt", "pt")
        after = torch.load(back / "model.pt", weights_only=True)
        assert sorted(before) == sorted(after)
        assert all(
            torch.equal(t, after[k]) and t.dtype == after[k].dtype for k, t in before.items()
        )
        for path in (folder, back):
            logits = load_model(path).logits(io["tokens"], io.get("context"))
            assert torch.equal(logits, direct)


@pytest.mark.parametrize("config", [CONFIG, TEXT], ids=["base", "video2world"])
@pytest.mark.parametrize("given", ["io.json", "model.yaml"])
def test_a_nemo_context_says_everything(config: ModelConfig, given: str, tmp_path: Path) -> None:
    nemo = _convert(_make(tmp_path / "pt", config), tmp_path / "repository" / "nemo", "nemo")
    assert open_source(nemo).config == config
    assert open_source(nemo).format.name == "megatron"  # with this package's context beside NeMo's
    _only_nemos_own_context(nemo)
    (other,) = {"io.json", "model.yaml"} - {given}
    (nemo / "context" / other).unlink()
    for path in (nemo, nemo.parent, nemo / "weights"):
        source = open_source(path)
        assert (source.format.name, source.path, source.config) == ("nemo", nemo, config)


def test_the_nemo_context_names_the_adapter(tmp_path: Path) -> None:
    nemo = _convert(_make(tmp_path / "pt", CONFIG), tmp_path / "nemo", "nemo")
    tree = yaml.safe_load((nemo / "context" / "model.yaml").read_text())
    assert tree["_target_"] == "cosmos_posttrain.nemo.CosmosModel"
    assert tree["config"]["_target_"] == "cosmos_posttrain.nemo.CosmosConfig"
    saved = json.loads((nemo / "context" / "io.json").read_text())
    objects = saved["objects"]
    assert set(saved["refcounts"]) == set(objects)
    root = objects[saved["root"]["key"]]
    model = objects[dict(root["items"])["Attr(name='model')"]["key"]]
    about = objects[model["metadata"]["key"]]
    named = dict(about["items"])["Attr(name='fn_or_cls')"]
    assert (named["module"], named["name"]) == ("cosmos_posttrain.nemo", "CosmosModel")
    assert model["paths"] == ["<root>.model"]  # where NeMo looks for the model
    references = json.dumps(saved).count('"type": "ref"')
    assert references == len(objects)


def test_a_context_of_the_originals_classes_is_parsed_not_imported(tmp_path: Path) -> None:
    """Fields without a type annotation are missing there: the published model's are taken."""
    published = preset("12B")
    values = nemo_context.values_of(published)
    for name in ("latent_shape", "original_latent_shape", "context_len", "position_scale"):
        values.pop(name, None)
    text = yaml.safe_dump({"_target_": "no.such.CosmosConfig12B", **values})
    text += "activation_func: !!python/name:os.system\n"
    (tmp_path / "context").mkdir()
    indented = textwrap.indent(text, "  ")
    (tmp_path / "context" / "model.yaml").write_text(f"config:\n{indented}")
    known = nemo_context.read(tmp_path)
    assert known["rope_theta"] == 500000.0 and "video_latent_shape" not in known
    shapes = _stacked_shapes(published)
    assert infer_config.from_shapes(shapes, known, "here") == published
    # Without a context, the shapes alone tell which published model it is; padding may differ.
    shapes["output_layer.weight"] = (64512, 5120)
    assert infer_config.from_shapes(shapes, {}, "here") == published
    # With another vocabulary it is a model on another grid, which nothing here tells.
    shapes["output_layer.weight"] = (1024, 5120)
    with pytest.raises(CheckpointError, match="does not say its video_latent_shape"):
        infer_config.from_shapes(shapes, {}, "here")
    said = {**known, "vocab_size": 1000, "vocab_size_in": 1000}
    assert infer_config.from_shapes(shapes, said, "here").vocab_size == 1000
    for size in ("4B", "5B-Video2World", "13B-Video2World"):
        assert infer_config.from_shapes(_stacked_shapes(preset(size)), {}, size) == preset(size)


def _stacked_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    reference = mapping.reference_shapes(config)
    shapes = {}
    for name in mapping.megatron_names(config):
        key, layer = torch_dist_weights.disk_key(name)

        def fetch(part: str) -> torch.Tensor:
            return torch.empty(reference[part], device="meta")

        shape = tuple(mapping.to_megatron(name, fetch, config).shape)
        stacked = shape if layer is None else (config.num_layers, *shape)
        shapes[key.removeprefix("module.")] = stacked
    return shapes


def test_megatron_lm_folders(tmp_path: Path) -> None:
    """No prefix, norms alone, another padding, two tensor-parallel pieces, optimizer state."""
    source = _make(tmp_path / "pt", CONFIG)
    run = tmp_path / "run"
    folder = run / "iter_0000100"
    folder.mkdir(parents=True)
    (run / "latest_checkpointed_iteration.txt").write_text("100\n")
    writer = TorchDistWriter(folder)
    for name, tensor in open_source(source).open_weights().all_megatron():
        key, layer = torch_dist_weights.disk_key(name)
        key = key.removeprefix("module.")
        for fused, alone in torch_dist_weights.NORMS_ALONE.items():
            key = key.replace(fused, alone)
        if key in torch_dist_weights.VOCABULARY:
            tensor = torch.nn.functional.pad(tensor[:100], (0, 0, 0, 156), value=7.0)
        writer.add(key, tensor, layer, CONFIG.num_layers)
    writer.add("optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight", torch.zeros(3))
    writer.add("decoder.layers.mlp.linear_fc1._extra_state", torch.zeros(2))
    writer.finish()
    with pytest.raises(CheckpointError, match="give --model_config"):
        open_source(run)
    named = {"model_config": str(source / "config.json")}
    assert open_source(run, **named).format.name == "torch_dist"
    assert _same(source, _convert(run, tmp_path / "back", "pt", **named))
    shutil.copyfile(source / "config.json", folder / "config.json")
    assert open_source(folder).config == CONFIG
    # Our rows of padding are zeros, whatever theirs were.
    again = _convert(folder, tmp_path / "megatron", "megatron")
    rows = TorchDistReader(again / "weights").read("module.output_layer.weight")
    assert rows.shape == (128, 32) and not rows[100:].any()


def test_pieces_are_put_together(tmp_path: Path) -> None:
    """A tensor in 2 x 2 pieces, as two tensor-parallel ranks of two stages write it."""
    whole = torch.arange(4 * 6 * 5.0).reshape(4, 6, 5)
    writers = [TorchDistWriter(tmp_path, rank) for rank in range(2)]
    for rank, writer in enumerate(writers):
        for layer in (0, 2):
            piece = whole[layer : layer + 2, 3 * rank : 3 * rank + 3]
            writer.add_box("weight", whole.shape, ((layer, 3 * rank, 0), piece))
        writer.close()
    assert not (tmp_path / ".metadata").exists()
    write_index(tmp_path, [writer.index for writer in writers])
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("weight"), whole)
    for layer in range(4):
        assert torch.equal(reader.read("weight", layer), whole[layer])
    first, second = torch.zeros(1, 4, 2), torch.zeros(4, 1, 5, dtype=torch.bfloat16)
    reader.read_into("weight", [((1, 1, 3), first), ((0, 5, 0), second)])
    assert torch.equal(first, whole[1:2, 1:5, 3:])
    assert torch.equal(second, whole[:, 5:].bfloat16())
    reader._chunks["weight"].pop()
    with pytest.raises(CheckpointError, match="lacks parts of weight"):
        reader.read("weight", 3)
    with pytest.raises(AssertionError, match="weight"):
        write_index(tmp_path, [writers[0].index])


def test_every_piece_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = TorchDistWriter(tmp_path)
    for row in range(0, 6, 2):
        writer.add_box("weight", (6, 4), ((row, 0), torch.full((2, 4), float(row))))
    writer.finish()
    reader = TorchDistReader(tmp_path)
    read: list[int] = []
    original = TorchDistReader._read_piece

    def counting(self: TorchDistReader, key: str, chunk: Any) -> torch.Tensor:
        read.append(chunk.offsets[0])
        return original(self, key, chunk)

    monkeypatch.setattr(TorchDistReader, "_read_piece", counting)
    boxes = [((row, 0), torch.zeros(1, 4)) for row in (0, 1, 5)]
    reader.read_into("weight", boxes)
    assert read == [0, 4]
    assert [box[0, 0].item() for _, box in boxes] == [0, 0, 4]


def test_model_pt_is_what_torch_save_writes(tmp_path: Path) -> None:
    source = _make(tmp_path / "pt", CONFIG)
    nemo = _convert(source, tmp_path / "nemo", "nemo")
    back = _convert(nemo, tmp_path / "back", "pt")
    assert _same(source, back)
    path = back / "model.pt"
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None  # checksums are right
    copied = torch.load(path, weights_only=True)
    mapped = torch.load(path, weights_only=True, mmap=True)
    for name, tensor in mapped.items():
        assert torch.equal(copied[name], tensor) and tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_safetensors_as_the_library_reads_and_writes_them(tmp_path: Path) -> None:
    source = _make(tmp_path / "pt", CONFIG)
    state = torch.load(source / "model.pt", weights_only=True)
    shards = _convert(source, tmp_path / "shards", "safetensors", max_shard_gb=8e-6)
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    files = sorted(shards.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    read = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert sorted(read) == sorted(state)
    assert all(torch.equal(tensor, read[name]) for name, tensor in state.items())
    for path in files:
        held = [n for n, file in index["weight_map"].items() if file == path.name]
        assert len(held) == 1 or sum(state[n].nbytes for n in held) <= 8000
    card = (shards / "README.md").read_text()
    assert card.startswith("---\n") and f"{CONFIG.num_parameters:,}" in card

    single = tmp_path / "single"
    single.mkdir()
    save_file(state, single / "model.safetensors")
    shutil.copyfile(source / "config.json", single / "config.json")
    assert _same(source, _convert(single, tmp_path / "back", "pt"))
    assert _same(source, _convert(single / "model.safetensors", tmp_path / "back2", "pt"))


def test_sizes_come_from_the_config_never_from_the_name(tmp_path: Path) -> None:
    """A folder that is called 12B and holds two layers."""
    folder = _make(tmp_path / "Cosmos-12B", CONFIG)
    nemo = _convert(folder, tmp_path / "Cosmos-4B", "nemo")
    _only_nemos_own_context(nemo)
    assert open_source(folder).config.num_layers == open_source(nemo).config.num_layers == 2
