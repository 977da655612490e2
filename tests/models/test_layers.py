"""RoPE, RMSNorm and the loss against slow, independent formulas."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import ConfigError, GeometryError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.inference.engine import generate
from cosmos_posttrain.models import specs
from cosmos_posttrain.models.attention import RotatedSelfAttention
from cosmos_posttrain.models.builder import transformer_config
from cosmos_posttrain.models.config import ModelConfig, YarnConfig
from cosmos_posttrain.models.norm import RMSNorm
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.models.rope import rotary_angles, rotary_table, rotate

SHAPE = LatentShape(5, 4, 6)


def _frequency(index: int, dim: int, original: int | None, yarn: YarnConfig | None) -> float:
    value = 500000.0 ** (-2 * index / dim)
    if yarn is None or original is None:
        return value
    high, low = (2 * math.pi * beta / original for beta in (yarn.beta_fast, yarn.beta_slow))
    keep = min(max((value - low) / (high - low), 0.0), 1.0)
    return value * (keep + (1 - keep) / yarn.scale)


@pytest.mark.parametrize("yarn", [None, YarnConfig(LatentShape(3, 4, 6))])
@pytest.mark.parametrize("width", [16, 24, 128])
def test_rotary_angles(width: int, yarn: YarnConfig | None) -> None:
    config = dataclasses.replace(
        preset("tiny"), kv_channels=width, latent_shape=SHAPE, rotary_base=500000.0, yarn=yarn
    )
    dim_space = width // 6 * 2
    dims = (width - 2 * dim_space, dim_space, dim_space)
    # The width's frequencies take the original height, as the reference's do.
    originals = (3, 4, 4) if yarn else (None, None, None)
    angles = rotary_angles(config)
    assert angles.shape == (120, width)
    for position in (0, 1, 7, 65, 119):
        t, h, w = position // 24, position // 6 % 4, position % 6
        half = [
            place * _frequency(index, dim, original, yarn)
            for place, dim, original in zip((t, h, w), dims, originals, strict=True)
            for index in range(dim // 2)
        ]
        expected = torch.tensor(half + half, dtype=torch.float32)
        torch.testing.assert_close(angles[position], expected, rtol=1e-5, atol=1e-6)


def test_yarn_changes_slow_frequencies_only() -> None:
    config = dataclasses.replace(preset("tiny"), latent_shape=LatentShape(9, 64, 64))
    original = LatentShape(9, 64, 64)
    plain = rotary_angles(config)
    slowed = rotary_angles(dataclasses.replace(config, yarn=YarnConfig(original)))
    row = 63 * 64  # t=0, h=63, w=0
    ratio = slowed[row][plain[row] > 0] / plain[row][plain[row] > 0]
    assert float(ratio.max()) == pytest.approx(1.0) and float(ratio.min()) == pytest.approx(0.5)


def test_interpolated_positions_lie_between_the_old_ones() -> None:
    config = preset("tiny", latent_shape=LatentShape(2, 4, 6))
    old = rotary_angles(config).view(2, 4, 6, -1)
    new = rotary_angles(config.at_grid(LatentShape(2, 8, 6), "interpolate")).view(2, 8, 6, -1)
    torch.testing.assert_close(new[:, ::2], old)
    torch.testing.assert_close(new[:, 1], (old[:, 0] + old[:, 1]) / 2)
    extrapolated = rotary_angles(config.at_grid(LatentShape(2, 8, 6))).view(2, 8, 6, -1)
    assert torch.equal(extrapolated[:, :4], old)


def test_special_tokens_are_not_rotated() -> None:
    base = preset("tiny", latent_shape=LatentShape(2, 3, 4))
    text = preset("tiny-video2world", latent_shape=LatentShape(2, 3, 4))
    angles = rotary_angles(text)
    assert torch.equal(angles[1:25], rotary_angles(base))
    assert angles.shape[0] == 64 and not angles[0].any() and not angles[25:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_megatrons_bit_for_bit(dtype: torch.dtype) -> None:
    groups.initialize(groups.Parallelism())
    config = preset("tiny", latent_shape=SHAPE)
    settings = transformer_config(config, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    shape = (SHAPE.num_tokens, 2, 8, config.kv_channels)
    x, upstream = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    # Attention's gradients do not lie in the order of their axes.
    upstream = upstream.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    result = rotate(ours, rotary_table(config).to(dtype))
    angles = rotary_angles(config)[:, None, None, :]
    expected = apply_rotary_pos_emb(theirs, angles, settings)
    for rotated in (result, expected):
        rotated.backward(upstream)
    assert torch.equal(result, expected) and result.dtype == dtype
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


class CountedFunctions(TorchDispatchMode):
    """Counts the tensor functions that are called inside it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_angles_are_computed_once() -> None:
    model = load_model("random:tiny", latent_shape=SHAPE)
    tokens = torch.arange(40)[None]
    with CountedFunctions() as training:
        model.module.train()(tokens, None, None, labels=tokens).sum().backward()
    with CountedFunctions() as decoding:
        generate(model, tokens, 5, temperature=0)
    for functions in (training, decoding):
        names = ("silu", "silu_")  # layers were seen at work
        assert sum(functions.counts.get(name, 0) for name in names) >= 4
        assert not {"cos", "sin"} & set(functions.counts)


def test_megatrons_own_cache_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The attention of the te spec, but for its kernels."""
    model = load_model("random:tiny", latent_shape=SHAPE)
    tokens = torch.randint(1000, (2, 40), generator=torch.Generator().manual_seed(0))
    settings = {"temperature": 0, "decoding": "modules"}
    expected = generate(model, tokens, 30, **settings)
    monkeypatch.setattr(specs, "CachedSelfAttention", RotatedSelfAttention)
    other = load_model("random:tiny", latent_shape=SHAPE)
    assert type(other.module.decoder.layers[0].self_attention) is RotatedSelfAttention
    assert torch.equal(generate(other, tokens, 30, **settings), expected)


def test_rms_norm() -> None:
    config = SimpleNamespace(params_dtype=torch.float32, sequence_parallel=True)
    norm = RMSNorm(config, 8, eps=1e-3)  # type: ignore[arg-type]
    with torch.no_grad():
        norm.weight.copy_(torch.arange(8.0))
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.empty_like(x)
    for i in range(3):
        for j in range(5):
            scale = math.sqrt(sum(float(v) ** 2 for v in x[i, j]) / 8 + 1e-3)
            expected[i, j] = x[i, j] / scale * torch.arange(8.0)
    torch.testing.assert_close(norm(x), expected)
    assert norm.weight.sequence_parallel
    assert norm.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_rows_that_pad_the_vocabulary_take_no_part_in_the_loss() -> None:
    config: ModelConfig = preset("tiny", vocab_size=1000, latent_shape=LatentShape(2, 3, 4))
    model = load_model("random:tiny", vocab_size=1000, latent_shape=config.latent_shape)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, (2, 24), generator=generator)
    labels = torch.randint(1000, (2, 24), generator=generator)
    with torch.no_grad():
        # Were they counted, they would dominate.
        model.module.output_layer.weight[1000:] = 10.0
        loss = model.module(tokens, None, None, labels=labels)
    logits = model.logits(tokens)
    assert logits.shape == (2, 24, 1000)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(loss.mean()) == pytest.approx(float(expected), rel=1e-5)


def test_tokens_that_do_not_fit() -> None:
    model = load_model("random:tiny", vocab_size=1000, latent_shape=LatentShape(2, 3, 4))
    for tokens, words in (
        (torch.zeros(1, 25, dtype=torch.int64), "25 tokens do not fit"),
        (torch.full((1, 3), 1000), "outside the model.s vocabulary 0..999"),
        (torch.full((1, 3), -1), "outside the model.s vocabulary"),
        (torch.zeros(1, 3), "int64"),
        (torch.zeros(3, dtype=torch.int64), r"give \(B, S\)"),
    ):
        with pytest.raises(GeometryError, match=words):
            model.logits(tokens)


def test_texts_and_first_tokens_that_do_not_fit() -> None:
    base = load_model("random:tiny", latent_shape=LatentShape(2, 3, 4))
    model = load_model("random:tiny-video2world", latent_shape=LatentShape(2, 3, 4))
    tokens, text = torch.tensor([[1000, 5, 6]]), torch.zeros(1, 3, 64)
    assert model.logits(tokens, text).shape == (1, 3, 1000)
    assert (
        model.logits(torch.full((1, 25), 5).index_fill(1, torch.tensor(0), 1000), text)
        .isfinite()
        .all()
    )
    with pytest.raises(ConfigError, match="takes no text"):
        base.logits(tokens[:, 1:], text)
    with pytest.raises(ConfigError, match=r"give context, \(B, L, 64\)"):
        model.logits(tokens)
    for bad in (text[0], text[:, :, 1:], text[:, :0], text.expand(2, -1, -1), text.long()):
        with pytest.raises(GeometryError, match=r"give \(1, L, 64\) floating-point"):
            model.logits(tokens, bad)
    for wrong, words in (
        (tokens[:, 1:], "must start with <bov>, 1000"),
        (torch.tensor([[1000, 1000, 6]]), "outside the model's vocabulary 0..999"),
        (torch.full((1, 26), 1000), "give at most 25"),
    ):
        with pytest.raises(GeometryError, match=words):
            model.logits(wrong, text)
