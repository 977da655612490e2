"""Static steps: the tokens of every other way of decoding, at fixed addresses, asking nothing."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos_posttrain import generate, launch, load_model
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.inference import sampling, static_step
from cosmos_posttrain.inference.decode_job import DecodeJob
from cosmos_posttrain.inference.decoding import Decoded
from cosmos_posttrain.inference.noise import stream_keys
from cosmos_posttrain.inference.sampling import Draw, choose
from cosmos_posttrain.inference.static_step import Runner
from cosmos_posttrain.models.ar_model import ARModel

GRID = LatentShape(3, 3, 4)
NUM_GIVEN, NUM_TOKENS = 12, 24
# Positions of a block: 36 tokens and a window lie in several buckets.
BLOCK = 4


def tiny(name: str, tensor_model_parallel_size: int = 1) -> ARModel:
    """Fresh weights, with louder tokens and text: positions drown those of a fresh model."""
    size = tensor_model_parallel_size
    model = load_model(f"random:{name}", latent_shape=GRID, tensor_model_parallel_size=size)
    if model.config.is_video2world:
        with torch.no_grad():
            model.module.embedding.word_embeddings.weight *= 50
            for layer in model.module.decoder.layers:
                layer.cross_attention.linear_proj.weight *= 50
    return model


def job(model: ARModel, batch_size: int, settings: dict[str, Any]) -> tuple[DecodeJob, Any]:
    """A batch, and what ``generate`` is told of it."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 1000, (batch_size, NUM_GIVEN), generator=generator)
    numbers, none = torch.arange(batch_size), torch.zeros(batch_size, dtype=torch.long)
    draw = Draw(stream_keys(none + 7, numbers, none), **settings)
    if not model.config.is_video2world:
        told = {**settings, "seed": 7}
        return DecodeJob(model, prompt, NUM_TOKENS, draw, None, 1.0, None, None), (prompt, told)
    prompt = torch.nn.functional.pad(prompt, (1, 0), value=1000)
    text = torch.randn(batch_size, 5, 64, generator=generator)
    both = torch.cat([text, torch.zeros_like(text)])
    draw = dataclasses.replace(draw, prefix=1)
    told = {**settings, "seed": 7, "context": text, "guidance_scale": 3.0}
    return DecodeJob(model, prompt, NUM_TOKENS, draw, both, 3.0, None, None), (prompt, told)


SETTINGS = ({"temperature": 0.0}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 20})


class Counted:
    """A runner that notes windows and blocks."""

    def __init__(self) -> None:
        self.keys: list[tuple[int, int]] = []

    def __call__(self, step: Runner) -> Runner:
        def run(count: int, num_blocks: int) -> None:
            self.keys.append((count, num_blocks))
            step(count, num_blocks)

        return run


@pytest.mark.parametrize("name", ["tiny", "tiny-video2world"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_tokens_of_every_other_way(name: str, batch_size: int) -> None:
    model = tiny(name)
    for settings in SETTINGS:
        one, (prompt, told) = job(model, batch_size, settings)
        found = {
            way: generate(model, prompt, NUM_TOKENS, decoding=way, **told)
            for way in ("modules", "sequential", "jacobi")
        }
        counted = Counted()
        with torch.inference_mode():
            for window in (5, None, 1):
                counted.keys.clear()
                found[f"static {window}"] = one.by_static_steps(window, counted, BLOCK)
        # One step for each token but the first, in several buckets.
        assert [count for count, _ in counted.keys] == [1] * (NUM_TOKENS - 1)
        assert len({blocks for _, blocks in counted.keys}) >= 3
        for way, tokens in found.items():
            assert torch.equal(tokens, found["modules"]), (way, settings)


def on_a_rank() -> list[list[int]]:
    one, _ = job(tiny("tiny-video2world", 2), 3, {"top_p": 0.8})
    with torch.inference_mode():
        found = one.by_static_steps(5, None, BLOCK)
    assert found is not None
    return found.tolist()


@pytest.mark.distributed
def test_two_ranks_draw_what_one_does() -> None:
    one, (prompt, told) = job(tiny("tiny-video2world"), 3, {"top_p": 0.8})
    expected = generate(one.model, prompt, NUM_TOKENS, **told).tolist()
    assert run_distributed(on_a_rank, 2) == [expected, expected]


WAITING = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select")


class Asked(TorchDispatchMode):
    """Refuses what makes the host wait for a number."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_step_asks_nothing(settings: dict[str, Any]) -> None:
    one, _ = job(tiny("tiny-video2world"), 3, settings)

    def watched(step: Runner) -> Runner:
        def run(count: int, num_blocks: int) -> None:
            with Asked():
                step(count, num_blocks)

        return run

    with torch.inference_mode():
        assert one.by_static_steps(5, watched, BLOCK) is not None
        # Such a draw asks: the refusal is no empty one.
        if settings.get("temperature") != 0:
            with pytest.raises(AssertionError, match="waits"), Asked():
                one.draw(torch.randn(3, 2, 1000), torch.arange(2))


def test_buffers_stay_where_they_are_and_observers_see_every_token() -> None:
    model = tiny("tiny")
    one, _ = job(model, 3, {"top_p": 0.8})
    seen: list[Decoded] = []
    addresses: set[tuple[int, ...]] = set()

    def noted(step: Runner) -> Runner:
        passes = step.__self__  # type: ignore[attr-defined]
        drafts, state = passes._drafts, passes._state

        def run(count: int, num_blocks: int) -> None:
            step(count, num_blocks)
            held = (drafts.tokens, drafts.known, drafts._drafted, drafts._confirmed)
            held += (state._keys, state._values, passes._drawn, passes._scores)
            addresses.add(tuple(tensor.data_ptr() for tensor in held))

        return run

    one = dataclasses.replace(one, observe=seen.append)
    with torch.inference_mode():
        found = one.by_static_steps(4, noted, BLOCK)
    assert found is not None and len(addresses) == 1
    for clip in range(3):
        parts = [part for part in seen if clip in part.clips]
        tokens = torch.cat([part.tokens[part.clips.index(clip)] for part in parts])
        assert torch.equal(tokens, found[clip])
        firsts = [0, *itertools.accumulate(part.tokens.shape[1] for part in parts)]
        assert [part.first for part in parts] == firsts[:-1]


def test_what_cannot_run_says_so_once_and_tells_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    one, _ = job(tiny("tiny"), 1, {"temperature": 0.0})
    told: list[Any] = []
    one = dataclasses.replace(one, progress=told.append, observe=told.append)

    def refuse(step: Runner) -> Runner:
        raise RuntimeError("operation not permitted when stream is capturing.\nMore lines")

    with torch.inference_mode():
        assert one.by_static_steps(1, refuse, BLOCK) is None
    assert not told
    assert capsys.readouterr().err == (
        "CUDA graphs are not used, tokens are decoded without: operation not permitted when stream "
        "is capturing; --no-cuda_graphs leaves them out.\n"
    )


def refused_on_one_rank(where: str) -> tuple[bool, list[list[int]]]:
    """Whether static steps were refused, and what is decoded next on the same groups."""
    model = tiny("tiny", 2)
    one, (prompt, told) = job(model, 2, {"temperature": 0.0})
    make = static_step.StaticState.__init__

    def refuse(*arguments: Any) -> Any:
        if launch.rank() == 1:
            raise RuntimeError("out of memory")
        return make(*arguments) if where == "state" else arguments[0]

    if where == "state":
        static_step.StaticState.__init__ = refuse  # type: ignore[method-assign]
    with torch.inference_mode():
        found = one.by_static_steps(5, refuse if where == "runner" else None, BLOCK)
    return found is None, generate(model, prompt, NUM_TOKENS, **told).tolist()


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["state", "runner"])
def test_what_one_rank_cannot_run_none_does(where: str) -> None:
    one, (prompt, told) = job(tiny("tiny"), 2, {"temperature": 0.0})
    expected = generate(one.model, prompt, NUM_TOKENS, **told).tolist()
    found = run_distributed(refused_on_one_rank, 2, where, timeout_seconds=60)
    assert found == [(True, expected)] * 2


def test_attention_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    one, (prompt, told) = job(tiny("tiny"), 3, {"temperature": 0.0})
    expected = generate(one.model, prompt, NUM_TOKENS, **told)
    monkeypatch.setattr(static_step, "_MAX_SCORES", 1)
    with torch.inference_mode():
        found = one.by_static_steps(5, None, BLOCK)
    assert found is not None and torch.equal(found, expected)


@pytest.mark.parametrize("top_k", [None, 40])
@pytest.mark.parametrize("top_p", [None, 0.0, 0.3, 0.8, 0.99])
def test_draws_that_do_not_wait(
    top_p: float | None, top_k: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 6, 500, generator=generator)
    keys = stream_keys(*torch.arange(6).view(3, 2))

    def numbers(tokens: torch.Tensor) -> torch.Tensor:
        return sampling.gumbel(keys, torch.arange(6), tokens)

    waiting = choose(logits, numbers, top_p=top_p, top_k=top_k)
    assert torch.equal(choose(logits, numbers, top_p=top_p, top_k=top_k, can_wait=False), waiting)
    monkeypatch.setattr(sampling, "_MAX_MASSES", 1)
    assert torch.equal(choose(logits, numbers, top_p=top_p, top_k=top_k, can_wait=False), waiting)
