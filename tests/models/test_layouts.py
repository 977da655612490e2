"""Loss and gradients at every layout, and with recomputation, against one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from helpers.distributed_run import run_distributed
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func

from cosmos_posttrain.checkpoint import mapping
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cpu_device, cuda_calls_mean_cpu, plain_torch
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.builder import build_model
from cosmos_posttrain.models.config import ModelConfig, YarnConfig
from cosmos_posttrain.models.naming import parameters_by_disk_name
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.models.rope import context_parallel_positions

GRID = LatentShape(3, 4, 8)  # 96 tokens, 128 with <bov> and padding: chunks at CP=4, too
MODELS = {
    "base": dataclasses.replace(preset("tiny", 300, GRID), yarn=YarnConfig(LatentShape(2, 4, 8))),
    "video2world": preset("tiny-video2world", 300, GRID),
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}


class Layout(NamedTuple):
    """Process groups, sequence parallelism, and settings of Megatron's config."""

    sizes: dict[str, int]
    sequence_parallel: bool = False
    settings: dict[str, Any] = {}  # noqa: RUF012


ONE = Layout({})
ON_TWO = {
    "TP": Layout({"tensor": 2}),
    "TP, SP": Layout({"tensor": 2}, True),
    "TP, SP, full": Layout({"tensor": 2}, True, FULL),
    "CP": Layout({"context": 2}),
    "CP, full": Layout({"context": 2}, False, FULL),
    "CP, selective": Layout({"context": 2}, False, SELECTIVE),
    "PP": Layout({"pipeline": 2}),
    "PP, full": Layout({"pipeline": 2}, False, FULL),
}
ON_FOUR = {
    "CP 4": Layout({"context": 4}),
    "TP, CP": Layout({"tensor": 2, "context": 2}),
    "TP, CP, SP": Layout({"tensor": 2, "context": 2}, True),
    "CP, PP": Layout({"context": 2, "pipeline": 2}),
}


class Result(NamedTuple):
    """What one rank has: its share of the loss, and its part of the gradients."""

    loss: float
    gradients: dict[str, torch.Tensor]
    tensor_rank: int
    tensor_size: int


def _batches(config: ModelConfig) -> Iterator[tuple[Any, ...]]:
    """Two micro-batches of one clip, each with a text of its own; tokens, labels, mask, text."""
    generator = torch.Generator().manual_seed(0)
    positions = context_parallel_positions(config.seq_length)
    for _ in range(2):
        tokens = torch.randint(config.vocab_size, (1, config.seq_length), generator=generator)
        if config.is_video2world:
            tokens[:, 0] = config.bov_token
            tokens[:, config.num_clip_tokens :] = config.pad_token
        labels = tokens.roll(-1, dims=1)
        mask = (labels < config.vocab_size).float()
        mask[:, -1] = 0
        part = [x[:, positions] for x in (tokens, labels.where(mask > 0, 0), mask)]
        text = {}
        if config.context_dim is not None:
            text["context"] = torch.randn(1, 7, config.context_dim, generator=generator)
        yield (*part, text)


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    total = (losses * mask).sum()
    return total, mask.sum().to(torch.int), {"sum": total.detach()}


def _forward_step(batches: Iterator, model: Any) -> tuple[torch.Tensor, Any]:
    with plain_torch(), cuda_calls_mean_cpu():
        tokens, labels, mask, text = next(batches)
        return model(tokens, None, None, labels=labels, **text), partial(_loss, mask)


def random_weights(name: str) -> dict[str, torch.Tensor]:
    """Whole tensors by name on disk, louder than fresh ones: every part moves the loss."""
    groups.initialize(groups.Parallelism())
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for key, parameter in parameters_by_disk_name(build_model(MODELS[name])):
        values = torch.randn(parameter.shape, generator=generator)
        is_norm = parameter.ndim == 1
        weights[key] = 1 + values / 10 if is_norm else values / parameter.shape[1] ** 0.5
    return weights


def run_layout(name: str, weights: dict[str, torch.Tensor], layout: Layout) -> Result:
    """Two micro-batches forward and backward, as training does them."""
    config = MODELS[name]
    groups.initialize(groups.Parallelism(**layout.sizes))
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    module = build_model(
        config,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=True,
        **layout.settings,
    )
    with torch.no_grad():
        for key, parameter in parameters_by_disk_name(module):
            parameter.copy_(mapping.shard(key, weights[key], rank, size))
    with cpu_device():
        ddp = DistributedDataParallel(
            module.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module
        ).train()
        module.config.finalize_model_grads_func = finalize_model_grads
        outputs = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=_batches(config),
            model=[ddp],
            num_microbatches=2,
            seq_length=config.seq_length,
            micro_batch_size=1,
            forward_only=False,
        )
    # Copies: views into Megatron's buffer would be sent whole.
    gradients = {key: p.main_grad.clone() for key, p in parameters_by_disk_name(module)}
    return Result(float(sum(x["sum"].double() for x in outputs)), gradients, rank, size)


def run_layouts(
    weights: dict[str, dict[str, torch.Tensor]], layouts: dict[str, Layout]
) -> dict[tuple[str, str], Result]:
    """Every model at every layout; at the top level, for processes."""
    results = {
        (name, key): run_layout(name, weights[name], layout)
        for name in MODELS
        for key, layout in layouts.items()
    }
    groups.shutdown()
    return results


def assert_gradients(
    gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], why: str
) -> None:
    for name, gradient in gradients.items():
        # The same float32 sums in another order; 3.3e-6 of the largest was measured.
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        difference = float((gradient - expected[name]).abs().max())
        assert difference <= 2e-5 * scale, f"{why}: {name} differs by {difference / scale:.1e}"


def assert_layouts_agree(world_size: int, layouts: dict[str, Layout]) -> None:
    weights = {name: random_weights(name) for name in MODELS}
    expected = {name: run_layout(name, weights[name], ONE) for name in MODELS}
    ranks = run_distributed(run_layouts, world_size, weights, layouts)
    for name, key in ranks[0]:
        seen: set[str] = set()
        shares = 0.0
        for results in ranks:
            result = results[name, key]
            part = {
                n: mapping.shard(
                    n, expected[name].gradients[n], result.tensor_rank, result.tensor_size
                )
                for n in result.gradients
            }
            assert_gradients(result.gradients, part, f"{name}, {key}")
            seen |= set(result.gradients)
            shares += result.loss / result.tensor_size  # its ranks have the same
        assert seen == set(weights[name]), (name, key)
        assert shares == pytest.approx(expected[name].loss, rel=1e-6), (name, key)


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_nothing(name: str) -> None:
    weights = random_weights(name)
    expected = run_layout(name, weights, ONE)
    for settings in (FULL, SELECTIVE):
        result = run_layout(name, weights, Layout({}, False, settings))
        assert_gradients(result.gradients, expected.gradients, f"{name}, {settings}")
        assert result.loss == expected.loss


@pytest.mark.distributed
def test_layouts_of_two_processes() -> None:
    assert_layouts_agree(2, ON_TWO)


@pytest.mark.slow
@pytest.mark.distributed
def test_layouts_of_four_processes() -> None:
    assert_layouts_agree(4, ON_FOUR)
