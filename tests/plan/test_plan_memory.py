"""The planner's memory model against what a real training step holds."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.distributed_run import run_distributed

from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.lora_shapes import lora_for
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.plan.memory import (
    Layout,
    Workload,
    checkpoint_bytes,
    gradient_bytes,
    host_bytes,
    layer_activation_bytes,
    logits_bytes,
    memory,
    offloaded_bytes,
    optimizer_bytes,
    stage_activation_bytes,
    weight_bytes,
)
from cosmos_posttrain.plan.parameters import parameter_groups
from cosmos_posttrain.training.optimizer import parts_of
from cosmos_posttrain.training.trainer import train

# The formulas leave out a few masks and what DDP adds to divide its buffers evenly.
TOLERANCE = 0.002

SERIAL = [
    ("float32", Layout()),
    ("bfloat16", Layout()),
    ("float32", Layout(recompute=True)),
    ("bfloat16", Layout(recompute=True)),
    ("bfloat16", Layout(recompute_mlp=True)),
]
PARALLEL = [
    ("bfloat16", Layout(tensor=2, sequence_parallel=True)),
    ("bfloat16", Layout(tensor=2, sequence_parallel=True, recompute=True)),
    ("bfloat16", Layout(tensor=2, sequence_parallel=True, recompute_mlp=True)),
    ("float32", Layout(tensor=2)),
    ("bfloat16", Layout(context=2)),
    ("float32", Layout(context=2)),
    ("bfloat16", Layout(context=2, recompute=True)),
    ("bfloat16", Layout(data=2)),
    ("bfloat16", Layout(pipeline=2)),
]


class SavedTensors:
    """Bytes that autograd keeps, each storage once, from the first forward to the first backward.

    Args:
        leave_out: tensors that are counted elsewhere, or are there anyway.
    """

    def __init__(self, leave_out: Iterator[torch.Tensor]) -> None:
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in leave_out}
        self._alive: list[torch.Tensor] = []  # a freed address could be given out again
        self._backward = False
        self.num_bytes = 0

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not self._backward and storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self._alive.append(tensor)
            self.num_bytes += storage.nbytes()
        return tensor

    def _unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        self._backward = True
        return tensor

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            yield


def weights_and_tables(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def write_tokens(folder: Path) -> Path:
    """Eight clips of the tiny model's grid, without a manifest."""
    from cosmos_posttrain.data.indexed import ShardWriter

    model = preset("tiny")
    writer = ShardWriter(folder / "tokens.bin", folder / "tokens.idx", "uint16")
    generator = np.random.default_rng(0)
    for _ in range(8):
        writer.add(generator.integers(0, model.vocab_size, model.seq_length, dtype=np.uint16))
    writer.finish()
    return folder / "tokens"


def training_config(tokens: Path, log_dir: Path, dtype: str, layout: Layout, **changes: Any) -> Any:
    """``changes`` are dotted keys with double underscores for dots."""
    from cosmos_posttrain.config import merge
    from cosmos_posttrain.training.config import TrainConfig

    settings = {
        "data.path": str(tokens),
        "data.split_string": "1,0,0",
        "data.latent_shape": "5,12,20",
        "data.vocab_size": 1000,
        "model.path": "random:tiny",
        "model.dtype": dtype,
        "model.recompute": layout.recompute,
        "model.recompute_modules": "mlp" if layout.recompute_mlp else None,
        "parallel.tensor_model_parallel_size": layout.tensor,
        "parallel.pipeline_model_parallel_size": layout.pipeline,
        "parallel.context_parallel_size": layout.context,
        "parallel.sequence_parallel": layout.sequence_parallel,
        "log_dir": str(log_dir),
        "max_steps": 1,
        "global_batch_size": 2,
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return merge(TrainConfig, None, list(settings.items()))


def optimizer_state_bytes(optimizer: Any) -> int:
    """Master weights that are no views of the model's, and the moments."""
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                total += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
        for group in getattr(part, "shard_fp32_from_float16_groups", []):
            total += sum(parameter.nbytes for parameter in group)
    return total


def measure(
    tokens: Path, log_dir: Path, dtype: str, layout: Layout, **changes: Any
) -> dict[str, float]:
    """One training step; bytes of what it holds on this rank, and of a checkpoint."""
    from megatron.core import parallel_state

    from cosmos_posttrain.training.trainer import Trainer

    torch.set_num_threads(1)
    trainer = Trainer(training_config(tokens, log_dir, dtype, layout, **changes))
    batches = next(trainer.batches())
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    saved = SavedTensors(weights_and_tables(trainer.ddp.module))
    with saved.counting():
        trainer.train_step(batches)
    trainer.close()
    return {
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "context_rank": parallel_state.get_context_parallel_rank(),
        "weights": sum(buffer.param_data.nbytes for buffer in trainer.ddp.buffers)
        + sum(parameter.nbytes for parameter in frozen),
        "gradients": sum(buffer.grad_data.nbytes for buffer in trainer.ddp.buffers),
        "optimizer": optimizer_state_bytes(trainer.optimizer.optimizer),
        "activations": saved.num_bytes,
    }


def kept_beside(tokens: Path, log_dir: Path, dtype: str, **changes: Any) -> dict[str, float]:
    """Of one process: averages of the weights on the device, and what a checkpoint copies."""
    from cosmos_posttrain.checkpoint import dist
    from cosmos_posttrain.training.trainer import Trainer

    trainer = Trainer(training_config(tokens, log_dir, dtype, Layout(), **changes))
    pieces = dist.own_part(trainer.model, trainer.optimizer).pieces
    averages = trainer.optimizer._averages or {}
    trainer.close()
    return {
        "optimizer": optimizer_state_bytes(trainer.optimizer.optimizer)
        + sum(average.nbytes for average in averages.values()),
        "host": sum(piece.box[1].nbytes for piece in pieces),
    }


def measure_all(tokens: Path, folder: Path, cases: list[tuple[str, Layout]]) -> list[dict]:
    """At the top level, for ``run_distributed``."""
    return [
        measure(tokens, folder / str(number), dtype, layout)
        for number, (dtype, layout) in enumerate(cases)
    ]


def planned(
    dtype: str,
    layout: Layout,
    stage: int,
    context_rank: int,
    lora_rank: int | None = None,
    grad_reduce_in_bf16: bool = False,
) -> dict[str, float]:
    lora = lora_for(preset("tiny"), lora_rank, None, None)
    model = dataclasses.replace(preset("tiny"), lora=lora)
    work = Workload(model, 1, 2, dtype, gpu_kernels=False, grad_reduce_in_bf16=grad_reduce_in_bf16)
    in_flight = min(layout.pipeline - stage, work.num_microbatches(layout))
    # The plan is that of the rank that needs most; the first one's first chunk needs no mask.
    chunk = work.model.seq_length / (2 * layout.context)
    unmasked = layout.context > 1 and context_rank == 0 and not layout.recompute
    spared = work.model.num_layers * work.element_bytes * chunk**2 if unmasked else 0
    if stage < layout.pipeline - 1:  # what a stage sends on, the schedule keeps and not autograd
        tokens = work.model.seq_length * work.micro_batch_size
        spared += in_flight * work.element_bytes * tokens * work.model.hidden_size
    return {
        "stage": stage,
        "context_rank": context_rank,
        "weights": weight_bytes(work, layout, stage),
        "gradients": gradient_bytes(work, layout, stage),
        "optimizer": optimizer_bytes(work, layout, stage),
        "activations": in_flight * stage_activation_bytes(work, layout, stage)
        + logits_bytes(work, layout, stage)
        - spared,
    }


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


def assert_as_planned(measured: dict[str, float], dtype: str, layout: Layout) -> None:
    plan = planned(dtype, layout, int(measured["stage"]), int(measured["context_rank"]))
    assert measured == pytest.approx(plan, rel=TOLERANCE), (dtype, layout)


@pytest.mark.parametrize(
    ("dtype", "layout"),
    SERIAL,
    ids=lambda v: v if isinstance(v, str) else f"{v.recompute}-{v.recompute_mlp}",
)
def test_one_process(tokens: Path, tmp_path: Path, dtype: str, layout: Layout) -> None:
    assert_as_planned(measure(tokens, tmp_path / "run", dtype, layout), dtype, layout)


def test_gradients_in_bf16(tokens: Path, tmp_path: Path) -> None:
    setting = {"optimizer__grad_reduce_in_bf16": True}
    measured = measure(tokens, tmp_path / "run", "bfloat16", Layout(), **setting)
    plan = planned("bfloat16", Layout(), 0, 0, grad_reduce_in_bf16=True)
    assert measured == pytest.approx(plan, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes(tokens: Path, tmp_path: Path) -> None:
    """Tensor, sequence, context, data and pipeline parallelism; every rank."""
    for results in run_distributed(measure_all, 2, tokens, tmp_path, PARALLEL):
        for measured, (dtype, layout) in zip(results, PARALLEL, strict=True):
            assert_as_planned(measured, dtype, layout)


def measure_lora(tokens: Path, log_dir: Path, dtype: str, layout: Layout) -> dict[str, float]:
    """At the top level, for ``run_distributed``."""
    return measure(tokens, log_dir, dtype, layout, model__lora_rank=8)


def assert_as_planned_with_lora(measured: dict[str, float], dtype: str, layout: Layout) -> None:
    plan = planned(dtype, layout, 0, 0, lora_rank=8)
    whole = planned(dtype, layout, 0, 0)
    for name in ("weights", "gradients", "optimizer"):
        assert measured[name] == pytest.approx(plan[name], rel=TOLERANCE), (name, dtype, layout)
    assert plan["gradients"] < 0.3 * whole["gradients"]
    # Frozen norms keep less than the plan says: an upper estimate.
    assert 0.7 * plan["activations"] < measured["activations"] <= 1.002 * plan["activations"]


@pytest.mark.parametrize("recompute", [False, True])
def test_lora_in_one_process(tokens: Path, tmp_path: Path, recompute: bool) -> None:
    layout = Layout(recompute=recompute)
    measured = measure_lora(tokens, tmp_path / "run", "bfloat16", layout)
    assert_as_planned_with_lora(measured, "bfloat16", layout)


@pytest.mark.parametrize(("dtype", "alone"), [("float32", False), ("bfloat16", True)])
def test_medusa_heads(tokens: Path, tmp_path: Path, dtype: str, alone: bool) -> None:
    settings: dict[str, Any] = {
        "model__num_medusa_heads": 2,
        "model__medusa_freeze_backbone": alone,
    }
    if alone:  # heads of fresh weights would learn nothing
        train(training_config(tokens, tmp_path / "model", "float32", Layout()))
        settings["model__path"] = str(tmp_path / "model")
    measured = measure(tokens, tmp_path / "run", dtype, Layout(), **settings)
    model = dataclasses.replace(preset("tiny"), num_medusa_heads=2)
    work = Workload(model, 1, 2, dtype, heads_alone=alone, gpu_kernels=False)
    stage = work, Layout(), 0
    plan = {
        "weights": weight_bytes(*stage),
        "gradients": gradient_bytes(*stage),
        "optimizer": optimizer_bytes(*stage),
        "activations": stage_activation_bytes(*stage) + logits_bytes(*stage),
    }
    assert {name: measured[name] for name in plan} == pytest.approx(plan, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("float32", {"optimizer__ema_decay": 0.9}),
        ("bfloat16", {}),
        ("bfloat16", {"optimizer__ema_decay": 0.9, "model__lora_rank": 8}),
    ],
    ids=["average", "alone", "average-lora"],
)
def test_what_a_checkpoint_copies(
    tokens: Path, tmp_path: Path, dtype: str, settings: dict[str, Any]
) -> None:
    """The average on the device, the host memory of --async_save, and the size on disk."""
    measured = kept_beside(tokens, tmp_path / "run", dtype, **settings)
    lora = lora_for(preset("tiny"), settings.get("model__lora_rank"), None, None)
    model = dataclasses.replace(preset("tiny"), lora=lora)
    work = Workload(model, 1, 2, dtype, keeps_average="optimizer__ema_decay" in settings)
    assert measured["optimizer"] == pytest.approx(optimizer_bytes(work, Layout(), 0), rel=TOLERANCE)
    assert measured["host"] == host_bytes(work, Layout()) == checkpoint_bytes(work)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [("float32", {}), ("bfloat16", {"optimizer__ema_decay": 0.9})],
    ids=["float32", "bfloat16-average"],
)
def test_the_optimizer_in_host_memory(
    tokens: Path, tmp_path: Path, dtype: str, settings: dict[str, Any]
) -> None:
    from cosmos_posttrain.training.trainer import Trainer

    settings = {"optimizer__cpu_offload": True, **settings}
    trainer = Trainer(training_config(tokens, tmp_path, dtype, Layout(), **settings))
    trainer.train_step(next(trainer.batches()))
    trainer.close()
    (part,) = parts_of(trainer.optimizer.optimizer)
    kept = list((trainer.optimizer._averages or {}).values())
    for inner in part.optimizer.sub_optimizers:
        for main, state in inner.state.items():
            kept += [main, main.grad, state["exp_avg"], state["exp_avg_sq"]]
    model_bytes = {buffer.param_data.untyped_storage().data_ptr() for buffer in trainer.ddp.buffers}
    assert not model_bytes & {tensor.untyped_storage().data_ptr() for tensor in kept}
    average = "optimizer__ema_decay" in settings
    work = Workload(preset("tiny"), 1, 2, dtype, keeps_average=average, offload_fraction=1.0)
    assert sum(tensor.nbytes for tensor in kept) == offloaded_bytes(work, Layout())
    assert optimizer_bytes(work, Layout(), 0) == 0
    # While it is built: this rank's eighth, and the weights of all eight ranks beside it.
    number = weight_bytes(dataclasses.replace(work, dtype="float32"), Layout(), 0) / 4
    assert offloaded_bytes(work, Layout(data=8)) == pytest.approx(4 * number * (1 + 1 / 8))
    half = dataclasses.replace(work, offload_fraction=0.5)
    without = dataclasses.replace(work, offload_fraction=0.0)
    assert optimizer_bytes(half, Layout(), 0) == optimizer_bytes(without, Layout(), 0) / 2
    assert memory(work, Layout()).total < memory(without, Layout()).total


def test_shares_of_a_checkpoint_add_up() -> None:
    """What the ranks copy is what lies on disk, but for norms, which tensor parallelism repeats."""
    work = Workload(preset("12B"), keeps_average=True)
    whole = checkpoint_bytes(work)
    assert whole == 18 * sum(parameter_groups(preset("12B")).values())
    for layout in (Layout(data=8), Layout(4, data=2), Layout(context=2, data=4)):
        assert 8 * host_bytes(work, layout) == pytest.approx(whole, rel=1e-3)
    assert 8 * host_bytes(work, Layout(2, 2, data=2)) == pytest.approx(whole, rel=0.01)


@pytest.mark.slow
@pytest.mark.distributed
def test_lora_in_two_processes(tokens: Path, tmp_path: Path) -> None:
    layout = Layout(tensor=2, sequence_parallel=True)
    for measured in run_distributed(measure_lora, 2, tokens, tmp_path / "run", "bfloat16", layout):
        assert_as_planned_with_lora(measured, "bfloat16", layout)


def saved_by_a_forward_pass(model: ModelConfig, dtype: str, **overrides: Any) -> int:
    """Bytes that one clip leaves for the backward pass, without the training script."""
    from cosmos_posttrain.distributed import groups
    from cosmos_posttrain.distributed.cpu_device import cuda_calls_mean_cpu
    from cosmos_posttrain.models.builder import build_model

    groups.initialize(groups.Parallelism())
    built = build_model(model, dtype=getattr(torch, dtype), **overrides).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.vocab_size, (1, model.seq_length), generator=generator)
    arguments = {}
    if model.context_dim is not None:
        shape = (1, model.context_len, model.context_dim)
        arguments["context"] = torch.randn(shape, generator=generator)
    saved = SavedTensors(weights_and_tables(built))
    with cuda_calls_mean_cpu(), saved.counting():
        built(ids, None, None, labels=ids, **arguments)
    return saved.num_bytes


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_with_a_text(dtype: str, recompute: bool) -> None:
    # A short clip with a long text, so that the text's share is seen.
    shape, layout = LatentShape(2, 6, 8), Layout(recompute=recompute)
    model = dataclasses.replace(preset("tiny-video2world"), latent_shape=shape, context_len=512)
    settings = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    measured = saved_by_a_forward_pass(model, dtype, **(settings if recompute else {}))
    work = Workload(model, dtype=dtype, gpu_kernels=False)
    expected = stage_activation_bytes(work, layout, 0) + logits_bytes(work, layout, 0)
    assert measured == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fused_swiglu_of_gpus(dtype: str) -> None:
    # A key for every head: a GPU's float32 attention would keep grouped ones repeated.
    model = dataclasses.replace(preset("tiny"), num_query_groups=8)
    with torch.compiler.set_stance("force_eager"):  # what is kept does not depend on the compiler
        measured = saved_by_a_forward_pass(model, dtype, bias_activation_fusion=True)
    work = Workload(model, dtype=dtype, gpu_kernels=True)
    expected = stage_activation_bytes(work, Layout(), 0) + logits_bytes(work, Layout(), 0)
    assert measured == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_peak_memory_on_a_gpu(tmp_path: Path, recompute: bool, offloaded: bool) -> None:
    """A wide model of two layers: the plan, without the framework's share, bounds what is used."""
    from cosmos_posttrain import launch
    from cosmos_posttrain.models.presets import PRESETS
    from cosmos_posttrain.training.trainer import Trainer

    model = dataclasses.replace(
        PRESETS["4B"], num_layers=2, vocab_size=1000, latent_shape=preset("tiny").latent_shape
    )
    layout = Layout(recompute=recompute)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", model)
        config = training_config(write_tokens(tmp_path), tmp_path / "run", "bfloat16", layout)
        config.micro_batch_size = 2
        config.optimizer.cpu_offload = offloaded
        torch.cuda.reset_peak_memory_stats(launch.device())
        trainer = Trainer(config)
        batches = next(trainer.batches())
        for _ in range(2):
            trainer.train_step(batches)
        trainer.close()
    peak = torch.cuda.max_memory_allocated(launch.device())
    expected = memory(Workload(model, 2, 2, offload_fraction=float(offloaded)), layout)
    # Buffers that come and go are an upper estimate, so the plan may be above what is used.
    held = expected.total - expected.overhead
    assert held - expected.working <= peak * 1.1
    assert peak <= held * 1.1


def test_a_formula_of_the_paper_in_the_limit() -> None:
    """34sbh of Korthikanti et al. (table 2, without scores) for wide models, term by term.

    Theirs: attention 11sbh with its input, MLP 19sbh, norms 4sbh in two bytes, with dropout masks,
    equal heads and a 4h MLP. Ours: norms whose input and result are kept, keys and values beside
    the packed projection, SwiGLU with three tensors.
    """
    hidden = 4096
    model = ModelConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=32,
        num_query_groups=32,
        kv_channels=128,
        ffn_hidden_size=4 * hidden,
        vocab_size=64,
        latent_shape=preset("4B").latent_shape,
    )
    per_channel = layer_activation_bytes(Workload(model), Layout()) / (hidden * model.seq_length)
    # norms 2 * 4; q and output 4, k and v 4, packed 2 * 3; SwiGLU 3 * 4 * 2; the rest is below 1.
    assert math.floor(per_channel) == 8 + 4 + 4 + 6 + 24
