"""What fits where when clips are generated: the formulas against what a model really holds."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.distributed_run import run_script

from cosmos_posttrain import load_model
from cosmos_posttrain.inference.decode_plan import DecodePlan
from cosmos_posttrain.inference.decode_state import DecodeState
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.plan import inference
from cosmos_posttrain.plan.inference import cache_bytes, inference_memory, weight_bytes
from cosmos_posttrain.plan.inference_report import verdict
from cosmos_posttrain.tokenizer.network import DVConfig, DVNetwork


@pytest.mark.parametrize("name", ["tiny", "tiny-video2world"])
def test_weights_and_cache_are_what_a_model_holds(name: str) -> None:
    model = load_model(f"random:{name}", dtype=torch.bfloat16)
    held = sum(p.numel() * p.element_size() for p in model.module.parameters())
    assert weight_bytes(model.config, "bf16") == held
    batch, rows = 3, model.config.num_clip_tokens
    context = None
    if model.config.is_video2world:
        assert model.config.context_dim is not None
        context = torch.zeros(batch, model.config.context_len, model.config.context_dim)
    state = DecodeState(DecodePlan(model), batch, rows, context)
    tensors = [state._keys, state._values, *(tensor for pair in state._texts for tensor in pair)]
    found = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # The cache has a place for every token of a clip; the plan counts <bov> and what pads it too.
    assert found == pytest.approx(cache_bytes(model.config, batch), rel=0.12)


def test_the_published_tokenizer() -> None:
    with torch.device("meta"):
        network = DVNetwork(DVConfig())
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == inference._TOKENIZER_PARAMETERS


def test_a_12b_model_in_24_gb_by_int8() -> None:
    model = preset("12B")
    assert verdict(inference_memory(model, "bf16"), 24) == "no"
    assert verdict(inference_memory(model, "int8"), 24) == "yes"  # never in bfloat16 there
    assert verdict(inference_memory(model, "int8"), 12) == "no"
    assert weight_bytes(model, "int8") < 0.54 * weight_bytes(model, "bf16")
    with_text = inference_memory(preset("13B-Video2World"), "int8")
    assert (verdict(with_text, 24), verdict(with_text, 28)) == ("offloaded", "yes")
    assert cache_bytes(model, 4) == 4 * cache_bytes(model, 1)


def test_the_table_and_its_json() -> None:
    finished = run_script(["-m", "cosmos_posttrain.plan", "--inference"])
    assert finished.returncode == 0, finished.stderr
    assert "13B-Video2World  int8" in finished.stdout and "80 GB" in finished.stdout
    arguments = ["--inference", "--model", "12B", "--gpu_memory_gb", "16", "--json"]
    finished = run_script(["-m", "cosmos_posttrain.plan", *arguments, "--batch_size", "8"])
    rows = json.loads(finished.stdout)
    assert [row["fits"] for row in rows] == [{"16": "no"}, {"16": "no"}]
    assert rows[0]["memory_bytes"]["weights"] == 2 * 11_560_975_360
