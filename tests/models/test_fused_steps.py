"""Norm, SwiGLU and rotated heads as single steps of autograd, against torch's own derivatives."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models import blocks, heads
from cosmos_posttrain.models import norm as norms
from cosmos_posttrain.models import swiglu as swiglus
from cosmos_posttrain.models.heads import rotated_heads
from cosmos_posttrain.models.norm import RMSNorm
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.models.rope import rotary_table, rotate
from cosmos_posttrain.models.swiglu import _SwiGLU

S, B, G, N, D = 24, 2, 2, 3, 24  # positions, clips, groups, queries of each, width of a head
CONFIG = preset("tiny", latent_shape=LatentShape(2, 3, 4))


@pytest.fixture(autouse=True, params=[1 << 17, 100], ids=["at once", "in blocks"])
def _block_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ON_THE_CPU", request.param)


def _norm(dtype: torch.dtype) -> RMSNorm:
    settings = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    return RMSNorm(settings, D)  # type: ignore[arg-type]


def _slow_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def _slow_swiglu(both: Tensor) -> Tensor:
    gate, gated = both.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * gated


def _slow_heads(packed: Tensor, query_weight: Tensor, key_weight: Tensor) -> tuple[Tensor, ...]:
    parts = packed.view(S, B, G, N + 2, D)
    query = _slow_norm(parts[..., :N, :].reshape(S, B, G * N, D), query_weight)
    rows = rotary_table(CONFIG).double()
    key = _slow_norm(parts[..., N, :], key_weight)
    return rotate(query, rows), rotate(key, rows), parts[..., N + 1, :]


def _compare(
    fast: Callable, slow: Callable, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Results and gradients against float64's, within what the dtype rounds."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    results, expected = fast(*inputs), slow(*exact)
    results, expected = (x if isinstance(x, tuple) else (x,) for x in (results, expected))
    upstream = [torch.randn(x.shape, generator=generator).to(dtype) for x in expected]
    # Attention's gradients do not lie in the order of their axes.
    upstream = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in upstream]
    found = (*results, *torch.autograd.grad(results, inputs, upstream))
    derivatives = torch.autograd.grad(expected, exact, [x.double() for x in upstream])
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    for value, right in zip(found, (*expected, *derivatives), strict=True):
        assert value.dtype == dtype
        difference = (value.detach().double() - right.detach()).abs().max()
        assert float(difference / right.detach().abs().max()) < tolerance


def _by_hand(function: Callable) -> Callable:
    """What torch.compile is given."""
    return function.__wrapped__  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(dtype: torch.dtype) -> None:
    _compare_compilable(lambda function: function, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_compiled(dtype: torch.dtype) -> None:
    _compare_compilable(_by_hand, dtype)


def _compare_compilable(taken: Callable[[Callable], Callable], dtype: torch.dtype) -> None:
    rows = rotary_table(CONFIG)
    norm, swiglu, rotate_heads = (taken(m._compiled) for m in (norms, swiglus, heads))
    _compare(lambda x, weight: norm(x, weight, 1e-5), _slow_norm, [(S, B, D), (D,)], dtype)
    _compare(swiglu, _slow_swiglu, [(S, B, 2 * D)], dtype)
    shapes: list[tuple[int, ...]] = [(S, B, G * (N + 2) * D), (D,), (D,)]
    _compare(lambda *x: rotate_heads(*x, rows, G, 1e-5), _slow_heads, shapes, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype: torch.dtype) -> None:
    norm = _norm(dtype)

    def fast(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    _compare(fast, _slow_norm, [(S, B, D), (D,)], dtype)


def test_a_norm_gives_the_same_bits_with_and_without_derivatives() -> None:
    """Recomputation runs the first pass without them."""
    norm, x = _norm(torch.float32), torch.randn(S, B, D)
    with torch.no_grad():
        expected = norm(x)
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    _compare(_SwiGLU.apply, _slow_swiglu, [(S, B, 2 * D)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_heads(dtype: torch.dtype) -> None:
    rows = rotary_table(CONFIG)

    def fast(packed: Tensor, query_weight: Tensor, key_weight: Tensor) -> tuple[Tensor, ...]:
        return rotated_heads(packed, query_weight, key_weight, rows, G, 1e-5)

    _compare(fast, _slow_heads, [(S, B, G * (N + 2) * D), (D,), (D,)], dtype)
