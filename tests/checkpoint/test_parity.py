"""Golden logits and weights: TP=1 and TP=2, saved at one layout and loaded at another, CP, SP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import run_distributed
from golden_ar import CASES, LOGIT_TOLERANCE, case_dir, case_io, max_difference, weights
from reference import needs_golden

from cosmos_posttrain.checkpoint import context, dist
from cosmos_posttrain.checkpoint.convert import ConvertConfig, convert
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cuda_calls_mean_cpu
from cosmos_posttrain.inference.engine import generate
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.builder import build_model
from cosmos_posttrain.models.rope import context_parallel_positions

pytestmark = needs_golden


def _greedy(model: ARModel, name: str) -> list[int]:
    """As many tokens as the golden case has, through the KV cache."""
    io, config = case_io(name), json.loads((case_dir(name) / "config.json").read_text())
    prompt = io["tokens"][:1, : config["num_condition_tokens"]].long()
    tokens: list[int] = generate(model, prompt, len(io["greedy_tokens"]), temperature=0)[0].tolist()
    return tokens


@pytest.mark.parametrize("name", CASES)
def test_golden_logits_and_greedy_tokens(name: str) -> None:
    io, model = case_io(name), load_model(case_dir(name))
    assert max_difference(model.logits(io["tokens"]), io["logits"]) <= LOGIT_TOLERANCE
    assert _greedy(model, name) == io["greedy_tokens"].tolist()


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_again_is_bit_equal(name: str, tmp_path: Path) -> None:
    for source, form in ((case_dir(name), "megatron"), (tmp_path / "megatron", "pt")):
        convert(ConvertConfig(str(source), str(tmp_path / form), form))
    before = weights(name)
    after = torch.load(tmp_path / "pt" / "model.pt", weights_only=True)
    assert sorted(before) == sorted(after)
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    io = case_io(name)
    direct = load_model(case_dir(name)).logits(io["tokens"])
    for form in ("megatron", "pt"):
        assert torch.equal(load_model(tmp_path / form).logits(io["tokens"]), direct)


def _loss_gradients(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> list[torch.Tensor]:
    with cuda_calls_mean_cpu():
        model(tokens, None, None, labels=labels).sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def _on_two_ranks(folder: str) -> dict[str, Any]:
    """Everything that needs two processes, in one start of them."""
    results: dict[str, Any] = {}
    for name in CASES:
        io = case_io(name)
        model = load_model(case_dir(name), tensor_model_parallel_size=2)
        results[name, "TP=2"] = max_difference(model.logits(io["tokens"]), io["logits"])
        results[name, "greedy"] = _greedy(model, name)

    # From here on, name is base_12b_like. Saved at TP=2, and loaded from a folder written at TP=1.
    saved = Path(folder) / "tp2" / "weights"
    if groups.rank() == 0:
        saved.mkdir(parents=True)
        context.write_context(saved.parent, model.config, {"contract": {"seq_length": 120}})
    groups.barrier()
    dist.save(saved, model.module)
    again = load_model(Path(folder) / "tp1", tensor_model_parallel_size=2)
    pairs = zip(model.module.parameters(), again.module.parameters(), strict=True)
    results["TP=1 -> TP=2"] = all(torch.equal(a, b) for a, b in pairs)

    source = open_source(case_dir(name))
    module = build_model(source.config, sequence_parallel=True)
    source.load_weights(module)
    results["SP"] = max_difference(ARModel(module).logits(io["tokens"]), io["logits"])

    groups.initialize(groups.Parallelism(context=2))
    module = build_model(source.config)
    source.load_weights(module)
    mine = context_parallel_positions(io["tokens"].shape[1])
    tokens, labels = io["tokens"].long(), io["tokens"].long().roll(-1, dims=1)
    with torch.no_grad():
        logits = module(tokens[:, mine], None, None)
    results["CP logits"] = max_difference(logits, io["logits"][:, mine])
    gradients = _loss_gradients(module, tokens[:, mine], labels[:, mine])
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)
    results["CP gradients"] = gradients if groups.rank() == 0 else None
    groups.shutdown()
    return results


@pytest.mark.distributed
def test_two_processes(tmp_path: Path) -> None:
    name = CASES[-1]
    convert(ConvertConfig(str(case_dir(name)), str(tmp_path / "tp1"), "megatron"))
    first, second = run_distributed(_on_two_ranks, 2, str(tmp_path))
    for results in (first, second):
        for case in CASES:
            assert results[case, "TP=2"] <= LOGIT_TOLERANCE
            assert results[case, "greedy"] == case_io(case)["greedy_tokens"].tolist()
        assert results["TP=1 -> TP=2"]
        assert results["SP"] <= LOGIT_TOLERANCE
        assert results["CP logits"] <= LOGIT_TOLERANCE

    # TP=2 -> TP=1: bit-equal.
    convert(ConvertConfig(str(tmp_path / "tp2"), str(tmp_path / "pt"), "pt"))
    after = torch.load(tmp_path / "pt" / "model.pt", weights_only=True)
    assert all(torch.equal(tensor, after[key]) for key, tensor in weights(name).items())
    model = load_model(tmp_path / "tp2")
    assert model.contract == {"seq_length": 120}
    io = case_io(name)
    assert max_difference(model.logits(io["tokens"]), io["logits"]) <= LOGIT_TOLERANCE

    model.module.zero_grad()
    tokens = io["tokens"].long()
    whole = _loss_gradients(model.module, tokens, tokens.roll(-1, dims=1))
    for a, b in zip(first["CP gradients"], whole, strict=True):
        # Sums over 240 tokens in another order.
        assert max_difference(a, b) <= 1e-5 * max(1.0, float(b.abs().max()))
