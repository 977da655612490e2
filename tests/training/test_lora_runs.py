"""LoRA: what is trained, what stays, what comes out, at every layout and in every form."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.prepared import make_videos, prepare_small
from helpers.run_case import losses, make_config, run

from cosmos_posttrain.checkpoint import context, dist
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.checkpoint.torch_dist import TorchDistReader
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.builder import build_model
from cosmos_posttrain.models.lora import is_factor
from cosmos_posttrain.models.lora_config import BASE_TARGETS, LoraConfig
from cosmos_posttrain.models.lora_shapes import (
    lora_for,
    num_lora_parameters,
    num_trained_parameters,
)
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.models.specs import block_spec
from cosmos_posttrain.training.config import TrainConfig, validate
from cosmos_posttrain.training.flops import flops_per_token

RANK = 4
# (processes, TP, PP, parts on each pipeline stage, CP, sequence parallelism); DP is what is left.
LAYOUTS = {
    "TP2": (2, 2, 1, 1, 1, False),
    "TP2 SP": (2, 2, 1, 1, 1, True),
    "PP2": (2, 1, 2, 1, 1, False),
    "PP2, interleaved": (2, 1, 2, 2, 1, False),
    "CP2": (2, 1, 1, 1, 2, False),
    "DP2": (2, 1, 1, 1, 1, False),
}


@pytest.fixture(scope="module")
def even_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 3x2x4 tokens, which two context-parallel ranks can share."""
    folder = tmp_path_factory.mktemp("even_tokens")
    (folder / "videos").mkdir()
    prepare_small(make_videos(folder / "videos"), folder / "tokens", width=32)
    return folder / "tokens"


@pytest.fixture(scope="module")
def start(even_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained in full for two steps."""
    folder = tmp_path_factory.mktemp("start")
    run(make_config(even_tokens, folder, max_steps=2, save_every_n_steps=2))
    return _checkpoint(folder, 1)


def _config(tokens: Path, start: Path, log_dir: Path, **changes: Any) -> TrainConfig:
    settings = {"model__path": str(start), "model__lora_rank": RANK, "model__lora_alpha": 8.0}
    settings |= {"max_steps": 20, "save_every_n_steps": 10, "optimizer__lr": 1e-2}
    return make_config(tokens, log_dir, **(settings | changes))


def _at(layout: tuple[int, int, int, int, int, bool]) -> dict[str, Any]:
    _, tensor, pipeline, chunks, context, sequence_parallel = layout
    return {
        "parallel__tensor_model_parallel_size": tensor,
        "parallel__pipeline_model_parallel_size": pipeline,
        "parallel__virtual_pipeline_model_parallel_size": chunks,
        "parallel__context_parallel_size": context,
        "parallel__sequence_parallel": sequence_parallel,
    }


def _checkpoint(log_dir: Path, step: int) -> Path:
    return next((log_dir / "default" / "checkpoints").glob(f"*step={step}"))


@pytest.fixture(scope="module")
def trained(even_tokens: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with LoRA in one process."""
    log_dir = tmp_path_factory.mktemp("trained")
    run(_config(even_tokens, start, log_dir))
    return log_dir


def test_matrices_and_norms_stay_bit_by_bit(start: Path, trained: Path) -> None:
    before = TorchDistReader(start / "weights")
    after = TorchDistReader(_checkpoint(trained, 19) / "weights")
    weights = [key for key in before.shapes if not key.startswith("optimizer.")]
    changed = {key for key in weights if not torch.equal(before.read(key), after.read(key))}
    assert changed == {"module.embedding.word_embeddings.weight", "module.output_layer.weight"}
    factors = {key for key in after.shapes if not key.startswith("optimizer.")} - set(weights)
    assert {key.rpartition(".")[2] for key in factors} == {"lora_a", "lora_b"}
    assert len(factors) == 2 * 4 and all(after.read(key).any() for key in factors)
    # Neither gradient memory nor moments for what is frozen.
    moments = {key for key in after.shapes if key.startswith("optimizer.state.exp_avg.")}
    assert moments == {f"optimizer.state.exp_avg.{key}" for key in changed | factors}
    curve = losses(trained)
    assert curve[-1] < curve[0] - 0.5


def _unmerged(checkpoint: Path) -> ARModel:
    """The model as it is trained, its factors beside the weights."""
    config = context.read_model_config(checkpoint)
    assert config.lora == LoraConfig(RANK, 8.0, BASE_TARGETS)
    groups.initialize(groups.Parallelism())
    module = build_model(config, seed=5)
    dist.load(checkpoint / "weights", module)
    return ARModel(module)


def test_merged_in_every_form_the_logits_are_the_same(trained: Path, tmp_path: Path) -> None:
    checkpoint = _checkpoint(trained, 19)
    tokens = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(0))
    model = _unmerged(checkpoint)
    expected = model.logits(tokens)
    for name, parameter in model.module.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.zero_()
    assert (model.logits(tokens) - expected).abs().max() > 0.1  # the factors count
    forms = {"as it is": checkpoint}
    for form in ("pt", "safetensors", "hf", "megatron", "nemo"):
        forms[form] = tmp_path / form
        convert(CheckpointConversionConfig(str(trained), str(forms[form]), form, verify=True))
    for form, path in forms.items():
        merged = load_model(path)
        assert merged.config.lora is None
        # Float32 sums in another order; measured: 2e-6.
        difference = float((merged.logits(tokens) - expected).abs().max())
        assert difference <= 1e-5, (form, difference)
    assert "lora" not in (tmp_path / "megatron" / "context" / "model.json").read_text()


def test_a_run_can_start_from_merged_weights_with_other_factors(
    even_tokens: Path, trained: Path, tmp_path: Path
) -> None:
    first = _checkpoint(trained, 19)
    changes = {"model__lora_rank": 2, "model__lora_targets": "linear_fc1", "max_steps": 2}
    run(_config(even_tokens, first, tmp_path / "again", **changes))
    merged, again = (
        open_source(first).open_weights(),
        TorchDistReader(_checkpoint(tmp_path / "again", 1) / "weights"),
    )
    name = "decoder.layers.3.mlp.linear_fc2.weight"
    stacked = again.read("module.decoder.layers.mlp.linear_fc2.weight")
    assert torch.equal(stacked[3], merged.megatron(name))
    assert again.shapes["module.decoder.layers.mlp.linear_fc1.lora_b"] == (4, 2, 512, 2)
    assert "module.decoder.layers.mlp.linear_fc2.lora_a" not in again.shapes


@pytest.mark.slow
@pytest.mark.distributed
def test_every_layout_has_the_curve_of_one_process(
    even_tokens: Path, start: Path, trained: Path, tmp_path: Path
) -> None:
    expected = losses(trained)
    for name, layout in LAYOUTS.items():
        config = _config(even_tokens, start, tmp_path / name, **_at(layout))
        run_distributed(run, layout[0], config, timeout_seconds=300)
        for step, (loss, wanted) in enumerate(zip(losses(tmp_path / name), expected, strict=True)):
            assert abs(loss - wanted) <= 1e-4 * wanted, (name, step)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_goes_on_at_another_layout(
    even_tokens: Path, start: Path, trained: Path, tmp_path: Path
) -> None:
    expected = losses(trained)
    for name in ("TP2 SP", "PP2, interleaved", "DP2"):
        log_dir = tmp_path / name
        shutil.copytree(trained, log_dir)
        shutil.rmtree(_checkpoint(log_dir, 19))
        config = _config(even_tokens, start, log_dir, **_at(LAYOUTS[name]))
        run_distributed(run, 2, config, timeout_seconds=300)
        for step in range(10, 20):
            assert abs(losses(log_dir)[step] - expected[step]) <= 1e-5, (name, step)
    again = _config(even_tokens, start, tmp_path / "again")
    shutil.copytree(trained, tmp_path / "again")
    shutil.rmtree(_checkpoint(tmp_path / "again", 19))
    run(again)
    assert losses(tmp_path / "again") == expected  # at the same layout to the last bit


def test_a_run_keeps_its_factors(even_tokens: Path, start: Path, trained: Path) -> None:
    for changes in ({"model__lora_rank": 8}, {"model__lora_rank": None, "model__lora_alpha": None}):
        config = _config(even_tokens, start, trained, max_steps=30, **changes)
        with pytest.raises(ConfigError, match="was trained with LoRA \\(rank 4, alpha 8, linear_"):
            run(config)
    assert len(losses(trained)) == 20


def test_new_rows_beside_factors(even_tokens: Path, start: Path, tmp_path: Path) -> None:
    """A tokenizer swap: rows begin anew and are trained, matrices stay."""
    config = _config(
        even_tokens, start, tmp_path, model__embedding_init="reset", max_steps=2, save_top_k=None
    )
    run(config)
    before, after = (TorchDistReader(x / "weights") for x in (start, _checkpoint(tmp_path, 1)))
    for key in before.shapes:
        if not key.startswith("optimizer."):
            is_row = "embedding" in key or "output_layer" in key
            assert torch.equal(before.read(key), after.read(key)) != is_row, key


def test_where_it_cannot_work_it_is_refused() -> None:
    config = TrainConfig()
    config.data.path, config.parallel.tensor_model_parallel_size = "x", 1
    config.model.lora_rank, config.model.layer_spec = 16, "te"
    with pytest.raises(ConfigError, match="--lora_rank does not work with --layer_spec te"):
        validate(config, world_size=1)
    with pytest.raises(ConfigError, match="use --layer_spec torch with --lora_rank"):
        block_spec("te", dataclasses.replace(preset("tiny"), lora=LORA), 4)
    config.model = dataclasses.replace(config.model, lora_rank=None, lora_targets="linear_qkv")
    with pytest.raises(ConfigError, match="--lora_targets has no effect without --lora_rank"):
        validate(config, world_size=1)
    for changes, sentence in (
        ({"targets": "linear_q"}, "which a base model does not have"),
        ({"targets": "q_proj"}, "--lora_targets 'q_proj' must name some of linear_qkv"),
        ({"rank": 193}, "--lora_rank 193 is above 192"),
    ):
        wanted: dict[str, Any] = {"rank": 4, "alpha": None, "targets": None, **changes}
        with pytest.raises(ConfigError, match=sentence):
            lora_for(preset("tiny"), **wanted)


LORA = LoraConfig(2, 2.0, BASE_TARGETS)


def test_counts_are_those_of_the_built_model() -> None:
    groups.initialize(groups.Parallelism())
    for name in ("tiny", "tiny-video2world"):
        config = dataclasses.replace(preset(name, 1024), lora=lora_for(preset(name), 3, None, None))
        module = build_model(config, device="meta")
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert trained == num_trained_parameters(config)
        factors = sum(p.numel() for n, p in module.named_parameters() if is_factor(n))
        assert factors == num_lora_parameters(config)
        # Forward and the input's gradient of what is frozen: two thirds of the work.
        whole = flops_per_token(dataclasses.replace(config, lora=None))
        assert 0.66 * whole < flops_per_token(config) < 0.9 * whole
