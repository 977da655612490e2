"""Attention against the formula: prefixes, groups, context parallelism, prompts in pieces, GPUs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.attention import SDPACoreAttention
from cosmos_posttrain.models.rope import context_parallel_positions
from cosmos_posttrain.models.sdpa import attend

HEADS, GROUPS, WIDTH = 6, 2, 16


def formula(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """All scores at once, in float64."""
    query, key, value = query.double(), key.double(), value.double()
    repeats = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(repeats, 2), value.repeat_interleave(repeats, 2)
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) / query.shape[-1] ** 0.5
    if causal:
        length, seen = scores.shape[-2:]
        hidden = torch.ones(length, seen, device=query.device).triu(1 + seen - length).bool()
        scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value).flatten(2)


def inputs(length: int, seen: int, batch_size: int = 2, groups: int = GROUPS) -> list[Tensor]:
    """Queries, keys and values, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, HEADS, WIDTH), (seen, groups, WIDTH), (seen, groups, WIDTH)]
    made = [torch.randn(s, batch_size, h, d, generator=generator) for s, h, d in shapes]
    return [*made, torch.randn(length, batch_size, HEADS * WIDTH, generator=generator)]


def with_gradients(function: Any, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """The function's result, and the gradients of its arguments."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    output.backward(upstream.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_close(results: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(results) == len(expected) == 4
    for result, wanted in zip(results, expected, strict=True):
        # Sums of some dozen float32 products in another order.
        torch.testing.assert_close(result.double(), wanted.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "seen"), [(24, 24), (8, 24), (1, 24), (1, 1)])
@pytest.mark.parametrize("groups", [GROUPS, HEADS])
def test_attention_to_a_prefix(length: int, seen: int, groups: int, causal: bool) -> None:
    *tensors, upstream = inputs(length, seen, groups=groups)
    results = with_gradients(lambda *x: attend(*x, causal=causal), tensors, upstream)
    assert_close(results, with_gradients(lambda *x: formula(*x, causal), tensors, upstream))


def attend_in_parallel(mask_type: AttnMaskType) -> list[Tensor]:
    """This rank's part of the output and of the gradients; at the top level, for processes."""
    groups.initialize(groups.Parallelism(context=launch.world_size()))
    *tensors, upstream = inputs(48, 48)
    mine = context_parallel_positions(48)
    core = SDPACoreAttention(None, 1)  # type: ignore[arg-type]
    return with_gradients(
        lambda *x: core(*x, attn_mask_type=mask_type), [x[mine] for x in tensors], upstream[mine]
    )


@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mask_type", [AttnMaskType.causal, AttnMaskType.no_mask])
def test_context_parallel_ranks_compute_what_one_does(size: int, mask_type: AttnMaskType) -> None:
    *tensors, upstream = inputs(48, 48)
    causal = mask_type == AttnMaskType.causal
    expected = with_gradients(lambda *x: formula(*x, causal), tensors, upstream)
    for rank, results in enumerate(run_distributed(attend_in_parallel, size, mask_type)):
        chunks = torch.arange(48).chunk(2 * size)
        mine = torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
        assert_close(results, [x[mine] for x in expected])


def test_a_prompt_in_pieces_is_the_prompt() -> None:
    model = load_model("random:tiny", latent_shape=LatentShape(2, 3, 4))
    tokens = torch.randint(1000, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = model.logits(tokens)
    cache = StaticInferenceContext(2, 24)
    end = 0
    with torch.inference_mode():
        for length in (5, 7, 1, 11):
            piece = tokens[:, end : end + length]
            end += length
            logits = model.next_token_logits(piece, cache)
            torch.testing.assert_close(logits, expected[:, end - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "seen"), [(64, 64), (32, 128), (96, 128)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-2), ("bfloat16", 5e-2)])
def test_kernels_of_gpus(
    length: int, seen: int, causal: bool, dtype: str, tolerance: float
) -> None:
    """float32 kernels may multiply in TF32, with 10 bits, as bfloat16 does with 8."""
    *tensors, upstream = (x.to("cuda", getattr(torch, dtype)) for x in inputs(length, seen))
    results = with_gradients(lambda *x: attend(*x, causal=causal), tensors, upstream)
    expected = with_gradients(lambda *x: formula(*x, causal), tensors, upstream)
    assert_close(results, expected, tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seen", [2048, 8192])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpus_hold_neither_scores_nor_a_mask(seen: int, causal: bool, dtype: str) -> None:
    *tensors, upstream = inputs(2048, seen, batch_size=1)
    *tensors, upstream = (x.to("cuda", getattr(torch, dtype)) for x in (*tensors, upstream))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with_gradients(lambda *x: attend(*x, causal=causal), tensors, upstream)
    used = torch.cuda.max_memory_allocated() - before
    # What it may use: some tensors of the size of all heads' queries or keys, in float32.
    assert used < 12 * 4 * seen * HEADS * WIDTH
    assert used < HEADS * 2048 * seen * tensors[0].element_size()
