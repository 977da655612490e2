"""Video2World training: gradients at every layout and with recomputation against one process."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.reference import GOLDEN_DIR, needs_golden
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from safetensors.torch import load_file

from cosmos_posttrain.checkpoint import mapping
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.cpu_device import cpu_device, cuda_calls_mean_cpu, plain_torch
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.absolute_positions import AbsolutePositions, sine_cosine_table
from cosmos_posttrain.models.builder import build_model
from cosmos_posttrain.models.config import AxisScale
from cosmos_posttrain.models.naming import parameters_by_disk_name
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.models.rope import context_parallel_positions

CASE = GOLDEN_DIR / "ar" / "video2world_13b_like"
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

# Process groups, sequence parallelism, and settings of Megatron's config.
LAYOUTS: dict[str, tuple[dict[str, int], bool, dict[str, Any]]] = {
    "TP": ({"tensor": 2}, False, {}),
    "TP, SP": ({"tensor": 2}, True, {}),
    "TP, SP, full": ({"tensor": 2}, True, FULL),
    "CP": ({"context": 2}, False, {}),
    "CP, full": ({"context": 2}, False, FULL),
    "PP": ({"pipeline": 2}, False, {}),
    "PP, full": ({"pipeline": 2}, False, FULL),
}


def _batches(config: Any) -> Iterator[tuple[torch.Tensor, ...]]:
    """Two micro-batches of one clip, each with a text of its own; tokens, labels, mask, text."""
    io = load_file(CASE / "io.safetensors")
    positions = context_parallel_positions(config.seq_length)
    surplus = config.seq_length - io["tokens"].shape[1]
    tokens = torch.nn.functional.pad(io["tokens"].long(), (0, surplus), value=config.pad_token)
    labels = tokens.roll(-1, dims=1)
    mask = (labels < config.vocab_size).float()
    for row in range(2):
        part = [x[row : row + 1, positions] for x in (tokens, labels.where(mask > 0, 0), mask)]
        yield (*part, io["context"][row : row + 1])


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict]:
    return (losses * mask).sum(), mask.sum().to(torch.int), {}


def _forward_step(batches: Iterator, model: Any) -> tuple[torch.Tensor, Any]:
    with plain_torch(), cuda_calls_mean_cpu():
        tokens, labels, mask, context = next(batches)
        return model(tokens, None, None, labels=labels, context=context), partial(_loss, mask)


def _gradients(
    sizes: dict[str, int], sequence_parallel: bool, settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """This rank's part of the gradients, by the parameters' names on disk."""
    groups.initialize(groups.Parallelism(**sizes))
    source = open_source(CASE)
    module = build_model(
        source.config,
        sequence_parallel=sequence_parallel,
        calculate_per_token_loss=True,
        **settings,
    )
    source.load_weights(module)
    with cpu_device():
        ddp = DistributedDataParallel(
            module.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), module
        ).train()
        module.config.finalize_model_grads_func = finalize_model_grads
        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=_batches(source.config),
            model=[ddp],
            num_microbatches=2,
            seq_length=source.config.seq_length,
            micro_batch_size=1,
            forward_only=False,
        )
    # Copies: views into Megatron's buffer would be sent whole.
    return {name: p.main_grad.clone() for name, p in parameters_by_disk_name(module)}


def _on_two_ranks() -> dict[str, tuple[dict[str, torch.Tensor], int, int]]:
    results = {}
    for name, layout in LAYOUTS.items():
        gradients = _gradients(*layout)
        rank = parallel_state.get_tensor_model_parallel_rank()
        size = parallel_state.get_tensor_model_parallel_world_size()
        results[name] = (gradients, rank, size)
    groups.shutdown()
    return results


def _check(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], why: str) -> None:
    for name, gradient in gradients.items():
        # The same float32 sums in another order; 4e-6 of the largest was measured.
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        difference = float((gradient - expected[name]).abs().max())
        assert difference <= 2e-5 * scale, f"{why}: {name} differs by {difference / scale:.1e}"


@needs_golden
@pytest.mark.distributed
def test_gradients_do_not_depend_on_the_layout_or_recomputation() -> None:
    expected = _gradients({}, False, {})
    for settings in (FULL, {"recompute_granularity": "selective"}):
        _check(_gradients({}, False, settings), expected, str(settings))
    ranks = run_distributed(_on_two_ranks, 2)
    for layout in LAYOUTS:
        seen = set()
        for results in ranks:
            gradients, rank, size = results[layout]
            part = {name: mapping.shard(name, expected[name], rank, size) for name in gradients}
            _check(gradients, part, layout)
            seen |= set(gradients)
        assert seen == set(expected), layout


def test_absolute_positions() -> None:
    shape, hidden = LatentShape(3, 4, 5), 32
    table = sine_cosine_table(shape, hidden, AxisScale(1.0, 0.5, 1.0))
    assert table.shape == (60, hidden) and table.dtype == torch.bfloat16
    dims = (12, 10, 10)
    for position in (0, 1, 7, 33, 59):
        t, h, w = position // 20, position // 5 % 4 * 0.5, position % 5
        expected = []
        for place, dim in zip((t, h, w), dims, strict=True):
            angles = [place / 10000 ** (2 * i / dim) for i in range(dim // 2)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rounded = torch.tensor(expected, dtype=torch.float64).to(torch.bfloat16)
        assert torch.equal(table[position], rounded)


def test_the_first_row_and_the_padding_are_zero() -> None:
    config = preset("tiny-video2world", latent_shape=LatentShape(2, 3, 4))
    assert (config.num_clip_tokens, config.seq_length) == (25, 64)
    table = AbsolutePositions(config).table[:, 0]
    assert table.shape == (64, config.hidden_size)
    zero = (table == 0).all(dim=1)
    assert zero[0] and zero[25:].all() and not zero[1:25].any()


def test_the_table_is_one_and_not_in_checkpoints() -> None:
    groups.initialize(groups.Parallelism())
    config = preset("tiny-video2world", latent_shape=LatentShape(2, 3, 4))
    module = build_model(dataclasses.replace(config, num_layers=2))
    tables = {id(layer.positions.table) for layer in module.decoder.layers}
    assert len(tables) == 1
    assert not [name for name in module.state_dict() if "table" in name]
    assert not [name for name in module.sharded_state_dict() if "table" in name]


def test_output_rows_are_fewer_than_input_rows() -> None:
    groups.initialize(groups.Parallelism())
    module = build_model(preset("tiny-video2world", latent_shape=LatentShape(2, 3, 4)))
    output, embedding = module.output_layer.weight, module.embedding.word_embeddings.weight
    assert (output.shape[0], embedding.shape[0]) == (1024, 1088)  # 1,000 and 1,064, padded
    # Megatron's optimizer tells them from the other matrices by this.
    assert output.is_embedding_or_output_parameter and embedding.is_embedding_or_output_parameter
