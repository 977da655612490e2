"""The decode plan against the model itself: any cut of a sequence, any places, golden logits."""

from __future__ import annotations

import pytest
import torch
from helpers.golden_ar import CASES, LOGIT_TOLERANCE, case_dir, case_io, max_difference

from cosmos_posttrain import load_model
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.inference import decode_state
from cosmos_posttrain.inference.decode_plan import DecodePlan
from cosmos_posttrain.inference.decode_state import DecodeState
from cosmos_posttrain.models.ar_model import ARModel

GRID = LatentShape(3, 3, 4)


def tiny(name: str) -> tuple[ARModel, torch.Tensor, torch.Tensor | None]:
    """A model, three clips that fill its grid, and their texts."""
    model = load_model(f"random:{name}", latent_shape=GRID)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 1000, (3, GRID.num_tokens), generator=generator)
    if name == "tiny":
        return model, tokens, None
    text = torch.randn(3, 5, 64, generator=generator)
    return model, torch.nn.functional.pad(tokens, (1, 0), value=1000), text


def open_state(model: ARModel, text: torch.Tensor | None, length: int) -> DecodeState:
    return DecodeState(DecodePlan(model), 3, length, text)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_golden_logits(name: str) -> None:
    model, io = load_model(case_dir(name)), case_io(name)
    tokens = io["tokens"].long()
    state = DecodeState(DecodePlan(model), *tokens.shape, io.get("context"))
    logits = state.feed(tokens, tokens.shape[1])
    assert max_difference(logits, io["logits"]) <= LOGIT_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "tiny-video2world"])
@pytest.mark.parametrize("cuts", [(12, 1, 1, 5, 1), (1, 1, 9, 9), (20,)])
def test_any_cut_of_a_sequence_gives_the_same(name: str, cuts: tuple[int, ...]) -> None:
    model, tokens, text = tiny(name)
    state, start = open_state(model, text, tokens.shape[1]), 0
    expected = model.logits(tokens, text)
    for count in cuts:
        found = state.feed(tokens[:, start : start + count], count)
        start += count
        assert state.length == start
        assert max_difference(found, expected[:, start - count : start]) <= LOGIT_TOLERANCE
    # Only the last scores, where only they are wanted.
    state.length = 4
    found = state.feed(tokens[:, 4:9], 2)
    assert found.shape == (3, 2, 1000)
    assert max_difference(found, expected[:, 7:9]) <= LOGIT_TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "tiny-video2world"])
def test_clips_at_different_places_and_drafts_that_are_replaced(name: str) -> None:
    model, tokens, text = tiny(name)
    length = tokens.shape[1]
    expected = model.logits(tokens, text)
    state = open_state(model, text, length + 6)
    state.feed(tokens[:, :12])
    wrong = (tokens[:, 12:18] + 1) % 1000
    state.feed(wrong, 6)  # drafts that come to nothing
    starts = [12, 15, 13]
    places = torch.tensor(starts)[:, None] + torch.arange(6)
    state.length = 12
    state.feed(tokens[:, 12:15], 3)
    found = state.feed(tokens.gather(1, places), 6, starts)
    wanted = expected.gather(1, places[..., None].expand(-1, -1, 1000))
    assert max_difference(found, wanted) <= LOGIT_TOLERANCE
    # A clip that is complete goes on beyond the grid; the others are not disturbed.
    starts = [length - 1, 18, 18]
    places = torch.tensor(starts)[:, None] + torch.arange(3)
    state.length = 18
    state.feed(tokens[:, 18 : length - 1], 1)
    fed = torch.nn.functional.pad(tokens, (0, 3)).gather(1, places)
    found = state.feed(fed, 3, starts)
    assert found.isfinite().all()
    wanted = expected[1:, 18:21]
    assert max_difference(found[1:], wanted) <= LOGIT_TOLERANCE
    single = state.feed(tokens[:, [7, 9, 8]].diagonal()[:, None], 1, [7, 9, 8])
    wanted = expected[torch.arange(3), torch.tensor([7, 9, 8])]
    assert max_difference(single[:, 0], wanted) <= LOGIT_TOLERANCE


def test_the_plan_holds_the_models_own_matrices() -> None:
    model = load_model("random:tiny", latent_shape=GRID)
    own = {parameter.data_ptr() for parameter in model.module.parameters()}
    plan = DecodePlan(model)
    for layer in plan.layers:
        for matrix in (layer.qkv, layer.out, layer.gate_up, layer.down):
            assert matrix.data_ptr() in own
    assert plan.embedding.data_ptr() in own


@pytest.mark.parametrize("count", [1, 5])
def test_attention_for_both_devices(count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 2, 4 * count, 8, generator=generator)
    keys, values = torch.randn(2, 3, 2, 20, 8, generator=generator)
    infinite = torch.tensor(-torch.inf)
    seen = torch.arange(20) < torch.tensor([9, 14, 20]).view(3, 1, 1, 1, 1)
    masks = [
        None,
        torch.zeros(count, count).where(torch.ones(count, count).tril().bool(), infinite),
        torch.zeros(3, 1, 1, count, 20).where(seen, infinite),
    ]
    for mask in masks:
        one = decode_state._attend_by_products(query, keys, values, mask)
        other = decode_state._attend_by_kernel(query, keys, values, mask)
        assert max_difference(one, other) < 1e-5


@torch.no_grad()
def test_bfloat16_is_close_to_float32() -> None:
    model, tokens, _ = tiny("tiny")
    exact = model.logits(tokens)
    rounded = load_model("random:tiny", latent_shape=GRID, dtype="bfloat16")
    rounded.module.load_state_dict(model.module.state_dict())
    state = open_state(rounded, None, tokens.shape[1])
    found = torch.cat([state.feed(tokens[:, :20], 20), state.feed(tokens[:, 20:24], 4)], 1)
    theirs = rounded.logits(tokens)[:, :24]
    error, other = ((x.float() - exact[:, :24]).abs().mean() for x in (found, theirs))
    # Both round to 8 bits at every step, in another order.
    assert float(error) < 1.5 * float(other)
