"""The engine: golden greedy tokens at TP=1 and TP=2, the cache against no cache, guidance."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.golden_ar import CASES, case_dir, case_io

from cosmos_posttrain import generate, load_model
from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError, GeometryError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.inference import sampling
from cosmos_posttrain.inference.decode_plan import DecodePlan
from cosmos_posttrain.inference.decode_state import DecodeState
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.builder import build_model
from cosmos_posttrain.runlog import ProgressDisplay

GRID = LatentShape(3, 3, 4)
WAYS = ("modules", "sequential", "jacobi")


@cache
def tiny_with_text() -> ARModel:
    """Fresh weights, with louder tokens and text: positions drown those of a fresh model."""
    model = load_model("tiny-video2world", latent_shape=GRID)
    with torch.no_grad():
        model.module.embedding.word_embeddings.weight *= 50
        for layer in model.module.decoder.layers:
            layer.cross_attention.linear_proj.weight *= 50
    return model


@cache
def tiny() -> ARModel:
    return load_model("tiny", latent_shape=GRID)


def prompts(batch_size: int = 2, length: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 1000, (batch_size, length), generator=generator)


def with_bov(tokens: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(tokens, (1, 0), value=1000)


def texts(batch_size: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, 5, 64, generator=generator)


def golden_case(name: str) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
    """The prompt (1, P), the text (1, L, C) or None, and the greedy continuation."""
    arrays = case_io(name)
    config = json.loads((case_dir(name) / "config.json").read_text())
    prompt = arrays["tokens"][:1, : config["num_condition_tokens"]]
    text = arrays["context"][:1] if "context" in arrays else None
    return prompt.long(), text, arrays["greedy_tokens"].flatten().tolist()


SHIPPED = tuple(name for name in CASES if not name.startswith("full-"))
FULL = tuple(name for name in CASES if name.startswith("full-"))
Tokens = dict[tuple[str, int], list[list[int]]]
# Ways to decode and batch sizes, on one rank and on two; all are compared with the first.
ALONE = (("modules", 3), *itertools.product(WAYS, (1, 3)))
SHARED = (("modules", 3), ("sequential", 1), ("jacobi", 1), ("jacobi", 3))


def generate_golden(name: str, tensor_model_parallel_size: int) -> tuple[Tokens, Tokens]:
    """Greedy and sampled continuations of the golden prompt, by way and batch size.

    The sampled ones are guided where there is a text. The golden clip is the first of its batch,
    the others are other clips.
    """
    model = load_model(case_dir(name), tensor_model_parallel_size=tensor_model_parallel_size)
    prompt, text, expected = golden_case(name)
    scale = 1.0 if text is None else 2.0
    greedy, drawn = {}, {}
    for way, size in ALONE if tensor_model_parallel_size == 1 else SHARED:
        shift = torch.arange(size)[:, None]
        first = 1 if text is not None else 0  # <bov> stays
        given = prompt.repeat(size, 1)
        given[:, first:] = (given[:, first:] + shift) % model.config.vocab_size
        texts = None if text is None else text.repeat(size, 1, 1)
        settings = {"context": texts, "decoding": way, "window": 5}
        tokens = generate(model, given, len(expected), temperature=0.0, **settings)
        greedy[way, size] = tokens.tolist()
        tokens = generate(
            model, given, len(expected), top_p=0.9, seed=7, guidance_scale=scale, **settings
        )
        drawn[way, size] = tokens.tolist()
    return greedy, drawn


def generate_all_golden(names: Sequence[str]) -> list[tuple[Tokens, Tokens]]:
    return [generate_golden(name, 2) for name in names]


def check_golden(name: str, greedy: Tokens, drawn: Tokens) -> None:
    """All ways and batches gave the same; greedy ones what the reference implementation gave."""
    for tokens in (greedy, drawn):
        for (way, size), rows in tokens.items():
            assert rows == tokens["modules", 3][:size], (name, way, size)
    assert greedy["jacobi", 1] == [golden_case(name)[2]]
    assert drawn["jacobi", 1] != greedy["jacobi", 1]


def generate_with_sequence_parallel() -> list[bool]:
    """Whether models with sequence parallelism generate the same, and are what they were after."""
    checks = []
    for name, tokens, text in (
        ("tiny", prompts(), None),
        ("tiny-video2world", with_bov(prompts()), texts()),
    ):
        model = load_model(f"random:{name}", latent_shape=GRID, tensor_model_parallel_size=2)
        module = build_model(model.config, sequence_parallel=True)
        module.load_state_dict(model.module.state_dict())
        before = switches(module)
        expected = generate(model, tokens, 6, context=text)
        tokens = generate(ARModel(module), tokens, 6, context=text)
        checks += [torch.equal(tokens, expected), switches(module) == before]
        # Every rank has the whole text: its keys and values are made without gathering.
        whole = [name for name, on in before.items() if not on]
        checks.append(all(name.endswith("linear_kv") for name in whole))
        checks.append(len(whole) == (0 if text is None else module.config.num_layers))
    return checks


def generate_where_ranks_round_differently(way: str) -> list[list[int]]:
    """Draws of two ranks that have other random numbers, as devices that round otherwise may."""
    model = load_model("random:tiny", latent_shape=GRID, tensor_model_parallel_size=2)
    if torch.distributed.get_rank() == 1:
        exact = sampling.gumbel
        sampling.gumbel = lambda *args: -exact(*args)  # type: ignore[assignment]
    rows: list[list[int]] = generate(model, prompts(), 24, seed=3, decoding=way).tolist()
    return rows


def switches(module: torch.nn.Module) -> dict[str, bool]:
    return {
        name: child.sequence_parallel
        for name, child in module.named_modules()
        if hasattr(child, "sequence_parallel")
    }


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_are_the_reference_implementations(name: str) -> None:
    check_golden(name, *generate_golden(name, 1))


@pytest.mark.distributed
@pytest.mark.parametrize(
    "names", [SHIPPED, pytest.param(FULL, marks=pytest.mark.slow)], ids=["shipped", "full"]
)
def test_two_ranks_generate_what_one_does(names: Sequence[str]) -> None:
    if not names:
        pytest.skip("the reference data is absent")
    first, second = run_distributed(generate_all_golden, 2, names)
    assert first == second
    for name, (greedy, drawn) in zip(names, first, strict=True):
        check_golden(name, greedy, drawn)
        alone = generate_golden(name, 1)[1]
        assert all(alone[key] == rows for key, rows in drawn.items())


@pytest.mark.distributed
@pytest.mark.parametrize("way", ["sequential", "jacobi"])
def test_ranks_that_round_differently_go_on_from_the_same_tokens(way: str) -> None:
    first, second = run_distributed(generate_where_ranks_round_differently, 2, way)
    assert first == second


@pytest.mark.distributed
def test_sequence_parallelism_is_switched_off_and_on_again() -> None:
    assert run_distributed(generate_with_sequence_parallel, 2) == [[True] * 8] * 2


def test_the_cache_gives_what_scoring_everything_again_gives() -> None:
    model, tokens = tiny(), prompts()
    num_tokens = GRID.num_tokens - tokens.shape[1]
    generated = generate(model, tokens, num_tokens, temperature=0.0)
    assert generated.shape == (2, num_tokens)
    assert generated.dtype == torch.int64
    whole = torch.cat([tokens, generated], 1)
    # Position p scores token p + 1.
    scores = model.logits(whole)[:, tokens.shape[1] - 1 : -1]
    assert torch.equal(scores.argmax(-1), generated)


def test_the_text_is_read_once_and_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, text = tiny_with_text(), with_bov(prompts()), texts()
    num_tokens = GRID.num_tokens + 1 - tokens.shape[1]
    calls = count_calls(monkeypatch, DecodePlan, "keys_and_values")
    generated = generate(model, tokens, num_tokens, temperature=0.0, context=text)
    assert calls == [1] * 4  # each layer, once
    whole = torch.cat([tokens, generated], 1)
    scores = model.logits(whole, text)[:, tokens.shape[1] - 1 : -1]
    assert torch.equal(scores.argmax(-1), generated)
    assert len(generated.unique()) > 2 and int(generated.max()) < 1000
    # Another text, another cache.
    swapped = generate(model, tokens, num_tokens, temperature=0.0, context=text.flip(0))
    assert not torch.equal(swapped, generated)


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> list[int]:
    """Grows with every call: by 1, or by the rows of the batch of a ``feed``."""
    calls: list[int] = []
    real = getattr(owner, name)

    def noting(self: object, first: torch.Tensor, *args: Any) -> Any:
        calls.append(len(first) if name == "feed" else 1)
        return real(self, first, *args)

    monkeypatch.setattr(owner, name, noting)
    return calls


def test_guidance_1_is_plain_sampling_and_costs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens, text = tiny_with_text(), with_bov(prompts()), texts()
    settings = {"top_p": 0.9, "seed": 3, "context": text, "decoding": "sequential"}
    plain = generate(model, tokens, 10, **settings)
    rows = count_calls(monkeypatch, DecodeState, "feed")
    guided = generate(model, tokens, 10, **settings, guidance_scale=1.0)
    assert torch.equal(guided, plain)
    assert rows == [2] * 10


@pytest.mark.parametrize("has_negative", [False, True])
def test_guidance_draws_from_both_scores(
    has_negative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens, text = tiny_with_text(), with_bov(prompts()), texts()
    other = text.flip(1) * 2 if has_negative else torch.zeros_like(text)
    num_tokens = GRID.num_tokens + 1 - tokens.shape[1]
    rows = count_calls(monkeypatch, DecodeState, "feed")
    generated = generate(
        model,
        tokens,
        num_tokens,
        temperature=0,
        decoding="sequential",
        context=text,
        guidance_scale=3.0,
        negative_context=other if has_negative else None,
    )
    assert rows == [4] * num_tokens  # two clips, twice
    monkeypatch.undo()
    whole = torch.cat([tokens, generated], 1)
    given, without = model.logits(whole, text), model.logits(whole, other)
    scores = (without + 3.0 * (given - without))[:, tokens.shape[1] - 1 : -1]
    assert torch.equal(scores.argmax(-1), generated)
    plain = generate(model, tokens, num_tokens, temperature=0, context=text)
    assert not torch.equal(plain, generated)
    # Each clip is what it is alone.
    alone = generate(
        model,
        tokens[:1],
        num_tokens,
        temperature=0,
        context=text[:1],
        guidance_scale=3.0,
        negative_context=other[:1],
    )
    assert torch.equal(alone, generated[:1])


def test_guidance_0_is_the_other_text_alone() -> None:
    model, tokens, text = tiny_with_text(), with_bov(prompts()), texts()
    other = text.flip(0)
    settings = {"top_p": 0.9, "seed": 3}
    guided = generate(
        model, tokens, 8, **settings, context=text, guidance_scale=0.0, negative_context=other
    )
    assert torch.equal(guided, generate(model, tokens, 8, **settings, context=other))


def test_bad_guidance_is_refused() -> None:
    model, tokens, text = tiny_with_text(), with_bov(prompts()), texts()
    with pytest.raises(ConfigError, match=r"guidance_scale 2\.0 needs a text.*base model"):
        generate(tiny(), prompts(), 4, guidance_scale=2.0)
    for scale in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="must be a number of at least 0"):
            generate(model, tokens, 4, context=text, guidance_scale=scale)
    with pytest.raises(ConfigError, match="no effect at guidance_scale 1"):
        generate(model, tokens, 4, context=text, negative_context=text)
    with pytest.raises(GeometryError, match=r"negative_context has shape \(2, 4, 64\)"):
        generate(model, tokens, 4, context=text, guidance_scale=2.0, negative_context=text[:, 1:])


def test_the_seed_decides_and_nothing_else() -> None:
    model, tokens = tiny(), prompts(1)
    first = generate(model, tokens, 12, seed=1)
    torch.manual_seed(99)
    assert torch.equal(first, generate(model, tokens, 12, seed=1))
    assert torch.equal(first[:, :5], generate(model, tokens, 5, seed=1))
    assert not torch.equal(first, generate(model, tokens, 12, seed=2))
    # The same clip twice in a batch continues in two ways, the first as if it were alone.
    pair = generate(model, tokens.expand(2, -1), 12, seed=1)
    assert torch.equal(pair[:1], first)
    assert not torch.equal(pair[0], pair[1])
    # Seed, item and sample are all that tells clips apart, wherever they stand in a batch.
    four = generate(
        model, tokens.expand(4, -1), 12, seed=[1, 2, 1, 1], items=[1, 0, 0, 0], samples=[0, 0, 1, 0]
    )
    assert torch.equal(four[0], pair[1]) and torch.equal(four[3], first[0])
    assert torch.equal(four[1:2], generate(model, tokens, 12, seed=2))
    assert len({tuple(row) for row in four.tolist()}) == 4


def test_generated_tokens_can_take_part_in_training() -> None:
    tokens = generate(tiny(), prompts(1), 4)
    embedding = torch.nn.Embedding(1000, 2)
    embedding(tokens).sum().backward()
    assert embedding.weight.grad is not None


def test_progress_counts_every_token(capsys: pytest.CaptureFixture[str]) -> None:
    counts: list[int] = []
    generate(tiny(), prompts(1), 3, decoding="sequential", progress=counts.append)
    assert counts == [1, 2, 3]
    line = ProgressDisplay(4, "tokens", "clip")
    for done in range(1, 5):
        line.show(done)
    output = capsys.readouterr().err
    assert output.startswith("clip: 4/4 tokens, ")
    assert output.endswith(" in all\n")


@pytest.mark.parametrize(
    ("tokens", "num_tokens", "message"),
    [
        (prompts(1, 12), 25, "together they can be at most 36"),
        (prompts(1, 0), 4, "must each be at least 1"),
        (prompts(1, 4), 0, "must each be at least 1"),
        (prompts(1, 4)[0], 4, r"give \(B, P\) int64"),
        (prompts(1, 4).float(), 4, r"give \(B, P\) int64"),
        (prompts(1, 4) + 1000, 4, "outside the model's vocabulary 0..999"),
        (prompts(1, 4) - 1000, 4, "outside the model's vocabulary 0..999"),
    ],
)
def test_bad_prompts_are_refused(tokens: torch.Tensor, num_tokens: int, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        generate(tiny(), tokens, num_tokens)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="there is no decoding 'fast'; use auto, sequential"):
        generate(tiny(), prompts(), 4, decoding="fast")
    with pytest.raises(ConfigError, match="window 1 must be at least 2"):
        generate(tiny(), prompts(), 4, decoding="jacobi", window=1)
    with pytest.raises(ConfigError, match="a number for each of the 2 clips"):
        generate(tiny(), prompts(), 4, items=[0])
    with pytest.raises(ConfigError, match="top_p 2"):
        generate(tiny(), prompts(), 4, top_p=2.0)
    with pytest.raises(ConfigError, match="takes no text"):
        generate(tiny(), prompts(), 4, context=torch.zeros(1, 2, 3))
    with pytest.raises(ConfigError, match="needs a text"):
        generate(tiny_with_text(), with_bov(prompts()), 4)
    with pytest.raises(GeometryError, match="must start with <bov>, 1000"):
        generate(tiny_with_text(), prompts(), 4, context=texts())
    with pytest.raises(GeometryError, match="together they can be at most 37"):
        generate(tiny_with_text(), with_bov(prompts()), 25, context=texts())


def test_weights_that_are_not_finite_are_an_error_and_not_a_video() -> None:
    model = load_model("tiny", latent_shape=GRID)
    with torch.no_grad():
        model.module.decoder.final_layernorm.weight.fill_(float("nan"))
    with pytest.raises(CosmosPosttrainError, match="not finite"):
        generate(model, prompts(), 4)
