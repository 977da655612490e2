"""Drafts from Medusa heads: never another token, fewer passes where they are right, counted."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.fed_tokens import FedTokens

from cosmos_posttrain import generate, load_model
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.inference.decoding import decode_in_windows, decode_one_by_one
from cosmos_posttrain.inference.head_drafts import HeadCounts, HeadDrafts, HeadRecord
from cosmos_posttrain.inference.noise import stream_keys
from cosmos_posttrain.inference.sampling import Draw
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.builder import build_model

VOCAB, NUM_HEADS = 30, 3
GRID = LatentShape(4, 3, 4)
SAMPLED = {"temperature": 1.0, "top_p": 0.9}


class Sums(FedTokens):
    """A model whose next token follows from all before it; its heads foretell what they are told.

    Flows in: tokens; out: scores, and of the heads scores of ``foretold`` (B, length).
    """

    foretold: torch.Tensor | None = None

    def scores_at(self, seen: torch.Tensor, total: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor(total * 7 % VOCAB), VOCAB) * 9.0

    def head_scores(self, rows: torch.Tensor) -> torch.Tensor:
        assert self.foretold is not None
        places = self.places[torch.arange(len(rows)), rows][:, None] + 2 + torch.arange(NUM_HEADS)
        wanted = self.foretold.gather(1, places.clamp(max=self.foretold.shape[1] - 1))
        return torch.nn.functional.one_hot(wanted, VOCAB) * 9.0


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("window", [None, 2, 4, 7])
def test_right_heads_save_passes_and_wrong_ones_cost_none(
    batch_size: int, window: int | None
) -> None:
    given = torch.randint(0, VOCAB, (batch_size, 6), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(batch_size, dtype=torch.long)
    draw = Draw(stream_keys(zeros, torch.arange(batch_size), zeros), 0, 0.0, None)
    expected = decode_one_by_one(Sums(batch_size), given, 40, draw)
    clips = torch.cat([given, expected], 1)
    passes = {}
    for name, foretold in (("right", clips), ("wrong", (clips + 1) % VOCAB)):
        model, counts = Sums(batch_size), HeadCounts()
        model.foretold = foretold
        heads = HeadDrafts(model.head_scores, draw, NUM_HEADS, counts)
        found = decode_in_windows(model, given, 40, draw, window, 6, heads=heads)
        assert torch.equal(found, expected)
        passes[name] = model.num_passes
        assert torch.equal(counts.right, counts.foretold * (name == "right"))
        # Each head foretells its place once after each pass, up to the clip's end.
        assert int(counts.foretold.min()) > 0 and int(counts.foretold.max()) <= 40
    assert passes["wrong"] <= 41
    least = min(window or 4, NUM_HEADS + 1)
    assert passes["right"] <= 40 / least + (22 if window is None else 4)  # the first to learn from


@cache
def with_heads(name: str = "tiny") -> ARModel:
    """Fresh weights with three heads that say something of their own."""
    model = load_model(name, latent_shape=GRID)
    config = dataclasses.replace(model.config, num_medusa_heads=NUM_HEADS)
    module = build_model(config, seed=7)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for head in module.medusa_heads:
            head.weight.normal_(0, 0.1, generator=generator)
    return ARModel(module)


def prompts(batch_size: int, first: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(first)
    return torch.randint(0, 1000, (batch_size, 12), generator=generator)


def decoded(**settings: Any) -> tuple[list[list[int]], list[list[int]]]:
    """At the top level for ``run_distributed``."""
    size = settings.pop("size", 1)
    if size > 1:
        load_model("random:tiny", tensor_model_parallel_size=size)  # process groups
    counts = HeadCounts()
    found = generate(with_heads(), prompts(3), 36, seed=5, head_counts=counts, **settings)
    return found.tolist(), counts.right.tolist()


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_tokens_are_those_of_one_after_another(sampling: dict[str, float], batch_size: int) -> None:
    model, given = with_heads(), prompts(batch_size)
    expected = generate(model, given, 36, seed=5, decoding="sequential", **sampling)
    modules = generate(model, given, 36, seed=5, decoding="modules", **sampling)
    assert torch.equal(expected, modules)
    for window in (None, 2, 4, 13):
        counts = HeadCounts()
        found = generate(
            model,
            given,
            36,
            seed=5,
            decoding="jacobi",
            window=window,
            head_counts=counts,
            **sampling,
        )
        assert torch.equal(found, expected)
        assert counts.foretold.shape == (batch_size, NUM_HEADS)
        assert int(counts.foretold.min()) > 0


def test_fresh_heads_foretell_what_the_model_says_next() -> None:
    """Their scores are the model's own; the plan's are those of the module."""
    from cosmos_posttrain.inference.decode_plan import DecodePlan
    from cosmos_posttrain.inference.decode_state import DecodeState

    model = with_heads()
    with torch.inference_mode():
        state = DecodeState(DecodePlan(model), 3, 12)
        scores = state.feed(prompts(3), 4)
        rows = torch.tensor([0, 3, 2])
        found = state.head_scores(rows)
        with model.module.hidden_states_only():
            hidden = model.module(prompts(3), None, None)[8:].transpose(0, 1)
        own = hidden[torch.arange(3), rows]
        for number, head in enumerate(model.module.medusa_heads):
            wanted = head(own) @ model.module.output_layer.weight.T
            torch.testing.assert_close(found[:, number], wanted[:, :1000], atol=1e-4, rtol=1e-4)
        state.plan._heads = [torch.zeros_like(head) for head in state.plan._heads]
        same = state.head_scores(rows)
        torch.testing.assert_close(same[:, 1], scores[torch.arange(3), rows])


def test_guided_clips() -> None:
    model = with_heads("tiny-video2world")
    given = torch.nn.functional.pad(prompts(2), (1, 0), value=1000)
    generator = torch.Generator().manual_seed(1)
    text, other = torch.randn(2, 2, 5, 64, generator=generator)
    settings = {"context": text, "negative_context": other, "guidance_scale": 1.5, "seed": 2}
    expected = generate(model, given, 36, decoding="sequential", **settings)
    found = generate(model, given, 36, decoding="jacobi", window=4, **settings)
    assert torch.equal(found, expected)


@pytest.mark.distributed
def test_tensor_parallel_gives_the_same_tokens_and_counts() -> None:
    for sampling in ({"temperature": 0.0}, SAMPLED):
        one = decoded(decoding="jacobi", window=4, **sampling)
        for found in run_distributed(decoded_of, 2, {"size": 2, "window": 4, **sampling}):
            assert found == one


def decoded_of(settings: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """At the top level for ``run_distributed``."""
    return decoded(decoding="jacobi", **settings)


def test_counts_of_chunks_add_up() -> None:
    assert HeadRecord((3, 2), (1, 0)) + HeadRecord((4, 4), (2, 1)) == HeadRecord((7, 6), (3, 1))
    counts = HeadCounts()
    assert counts.of_clip(0) is None
    counts.foretold, counts.right = torch.tensor([[3, 2], [1, 1]]), torch.tensor([[1, 0], [1, 1]])
    found = counts.of_clip(1)
    assert found is not None and found.to_json() == {"foretold": [1, 1], "right": [1, 1]}
