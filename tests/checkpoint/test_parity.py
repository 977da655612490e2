"""Golden logits and weights: TP=1 and TP=2, saved at one layout and loaded at another, CP, SP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.contracts import data_of, make_tokenizer
from helpers.distributed_run import run_distributed
from helpers.golden_ar import (
    CASES,
    LOGIT_TOLERANCE,
    case_dir,
    case_io,
    cases_of,
    golden_logits,
    greedy_tokens,
    logit_difference,
    max_difference,
    weights,
)

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint import context, dist
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cuda_calls_mean_cpu
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.builder import build_model
from cosmos_posttrain.models.config import ROPE_SCALINGS, YarnConfig
from cosmos_posttrain.models.rope import context_parallel_positions

pytestmark = pytest.mark.compat

# Saved at one tensor parallel size and loaded at the other.
RESHARDED = cases_of("base_12b_like", "video2world_13b_like")
DATA = data_of(make_tokenizer("codes", 512))


@pytest.mark.parametrize("name", CASES)
def test_golden_logits_and_greedy_tokens(name: str) -> None:
    model = load_model(case_dir(name))
    assert logit_difference(model, name) <= LOGIT_TOLERANCE
    assert greedy_tokens(model, name) == case_io(name)["greedy_tokens"].tolist()


@pytest.mark.parametrize("name", cases_of("base_4b_like", "video2world_5b_like"))
def test_a_longer_grid(name: str) -> None:
    longer = LatentShape(6, 4, 8)  # of (3, 4, 8)
    models = {
        scaling: load_model(case_dir(name), latent_shape=longer, rope_scaling=scaling)
        for scaling in ROPE_SCALINGS
    }
    # The first frames' positions are the old ones, unless something is scaled.
    assert logit_difference(models["none"], name) <= LOGIT_TOLERANCE
    assert logit_difference(models["interpolate"], name) > 100 * LOGIT_TOLERANCE
    assert logit_difference(models["yarn"], name) > 100 * LOGIT_TOLERANCE
    assert models["interpolate"].config.position_scale == (0.5, 1.0, 1.0)
    assert models["yarn"].config.yarn == YarnConfig(LatentShape(3, 4, 8), 2.0)


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_again_is_bit_equal(name: str, tmp_path: Path) -> None:
    for source, form in ((case_dir(name), "megatron"), (tmp_path / "megatron", "pt")):
        convert(CheckpointConversionConfig(str(source), str(tmp_path / form), form))
    before = weights(name)
    after = torch.load(tmp_path / "pt" / "model.pt", weights_only=True)
    assert sorted(before) == sorted(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    direct = golden_logits(load_model(case_dir(name)), name)
    for form in ("megatron", "pt"):
        assert torch.equal(golden_logits(load_model(tmp_path / form), name), direct)


def _loss_gradients(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    with cuda_calls_mean_cpu():
        model(tokens, None, None, labels=labels).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def _saved_and_loaded(folder: Path, model: ARModel, name: str) -> dict[str, Any]:
    """Saved at TP=2, and loaded from a folder written at TP=1; with sequence parallelism on."""
    saved = folder / f"{name}-tp2" / "weights"
    if launch.rank() == 0:
        saved.mkdir(parents=True)
        context.write_context(saved.parent, model.config, DATA)
    groups.barrier()
    dist.save(saved, model.module)
    again = load_model(folder / f"{name}-tp1", tensor_model_parallel_size=2)
    pairs = zip(model.module.parameters(), again.module.parameters(), strict=True)
    source = open_source(case_dir(name))
    module = build_model(source.config, sequence_parallel=True)
    source.load_weights(module)
    return {
        "TP=1 -> TP=2": all(torch.equal(a, b) for a, b in pairs),
        "SP": logit_difference(ARModel(module), name),
        "SP greedy": greedy_tokens(ARModel(module), name),
    }


def _on_two_ranks(folder: str) -> dict[str, Any]:
    """Everything that needs two processes, in one start of them."""
    results: dict[str, Any] = {}
    for name in CASES:
        model = load_model(case_dir(name), tensor_model_parallel_size=2)
        results[name] = {
            "TP=2": logit_difference(model, name),
            "greedy": greedy_tokens(model, name),
        }
        if name in RESHARDED:
            results[name] |= _saved_and_loaded(Path(folder), model, name)

    name = "base_12b_like"
    io, source = case_io(name), open_source(case_dir(name))
    groups.initialize(groups.Parallelism(context=2))
    module = build_model(source.config)
    source.load_weights(module)
    mine = context_parallel_positions(io["tokens"].shape[1])
    tokens, labels = io["tokens"].long(), io["tokens"].long().roll(-1, dims=1)
    with torch.no_grad():
        logits = module(tokens[:, mine], None, None)[..., : source.config.vocab_size]
    results["CP logits"] = max_difference(logits, io["logits"][:, mine])
    gradients = _loss_gradients(module, tokens[:, mine], labels[:, mine])
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)
    results["CP gradients"] = gradients if launch.rank() == 0 else None
    groups.shutdown()
    return results


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    for name in RESHARDED:
        convert(
            CheckpointConversionConfig(
                str(case_dir(name)), str(tmp_path / f"{name}-tp1"), "megatron"
            )
        )
    first, second = run_distributed(_on_two_ranks, 2, str(tmp_path))
    for results in (first, second):
        for case in CASES:
            expected = case_io(case)["greedy_tokens"].tolist()
            assert results[case]["TP=2"] <= LOGIT_TOLERANCE
            assert results[case]["greedy"] == expected
            if case in RESHARDED:
                assert results[case]["TP=1 -> TP=2"]
                assert results[case]["SP"] <= LOGIT_TOLERANCE
                assert results[case]["SP greedy"] == expected
        assert results["CP logits"] <= LOGIT_TOLERANCE

    # TP=2 -> TP=1: bit-equal.
    for name in RESHARDED:
        saved, back = tmp_path / f"{name}-tp2", tmp_path / f"{name}-pt"
        convert(CheckpointConversionConfig(str(saved), str(back), "pt"))
        after = torch.load(back / "model.pt", weights_only=True)
        assert all(torch.equal(tensor, after[key]) for key, tensor in weights(name).items())
        model = load_model(saved)
        assert model.contract == DATA.contract
        assert logit_difference(model, name) <= LOGIT_TOLERANCE

    model = load_model(case_dir("base_12b_like"))
    tokens = case_io("base_12b_like")["tokens"].long()
    whole = _loss_gradients(model.module, tokens, tokens.roll(-1, dims=1))
    for a, b in zip(first["CP gradients"], whole, strict=True):
        # Sums over 240 tokens in another order.
        assert max_difference(a, b) <= 1e-5 * max(1.0, float(b.abs().max()))
