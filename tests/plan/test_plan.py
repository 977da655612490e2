"""The planner's counts, rules, search and command line."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_script

from cosmos_posttrain.cli import parse
from cosmos_posttrain.config import merge
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.lora_config import BASE_TARGETS, ROW_PARALLEL, LoraConfig
from cosmos_posttrain.models.lora_shapes import lora_for, num_lora_parameters, target_shapes
from cosmos_posttrain.models.presets import PRESETS, preset
from cosmos_posttrain.models.reference_config import to_reference
from cosmos_posttrain.plan import __main__ as command_line
from cosmos_posttrain.plan import layouts, report, speed
from cosmos_posttrain.plan.layouts import GIB
from cosmos_posttrain.plan.memory import Layout, Workload, memory, stage_memory
from cosmos_posttrain.plan.parameters import (
    parameter_groups,
    rank_parameters,
    rank_trained_parameters,
)
from cosmos_posttrain.training.config import FLAGS, TrainConfig, validate
from cosmos_posttrain.training.metrics import flops_per_token

H100 = speed.Hardware("H100", 989e12, 450e9, 0.4)


def cluster(num_gpus: int, gigabytes: float = 80, per_node: int = 8) -> layouts.Cluster:
    return layouts.Cluster(num_gpus, gigabytes * GIB, per_node, H100)


def group_of(name: str) -> str:
    """The kind of a built model's parameter."""
    for part, group in (
        ("norm", "norm"),
        ("cross_attention", "cross_attention"),
        ("self_attention", "attention"),
        ("mlp", "mlp"),
        ("embedding", "embedding"),
        ("output_layer", "output"),
    ):
        if part in name:
            return group
    raise AssertionError(name)


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_the_built_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cosmos_posttrain import launch
    from cosmos_posttrain.distributed import groups
    from cosmos_posttrain.models.builder import build_model

    groups.initialize(groups.Parallelism())
    # Shapes without memory: the largest model takes half a second.
    monkeypatch.setattr(launch, "device", lambda: torch.device("meta"))
    with torch.device("meta"):
        built = build_model(PRESETS[name])
    counts = dict.fromkeys(parameter_groups(PRESETS[name]), 0)
    for parameter_name, parameter in built.named_parameters():
        counts[group_of(parameter_name)] += parameter.numel()
    assert counts == parameter_groups(PRESETS[name])
    config = PRESETS[name]
    assert sum(counts.values()) == config.num_parameters + config.num_padding_parameters


@pytest.mark.parametrize("pipeline", [1, 2, 4, 8])
def test_ranks_hold_the_whole_model(pipeline: int) -> None:
    model = preset("12B")
    groups, layers = parameter_groups(model), model.num_layers
    stages = [rank_parameters(model, 4, pipeline, stage) for stage in range(pipeline)]
    # Norms are on all four tensor-parallel ranks, everything else is on one.
    assert 4 * sum(stages) == sum(groups.values()) + 3 * groups["norm"]
    assert stages[-1] - stages[0] == (model.hidden_size if pipeline > 1 else 0)
    assert layers % pipeline == 0


def test_memory_of_a_known_case() -> None:
    """4B on one GPU: 2 + 4 + 12 bytes a parameter; a sixth of the 3.3 GB of logits at a time."""
    used = memory(Workload(preset("4B")), Layout())
    count = sum(parameter_groups(preset("4B")).values())
    assert used.weights == 2 * count + 12800 * 128 * 4
    assert (used.gradients, used.optimizer) == (4 * count, 12 * count)
    assert used.logits == 0
    assert used.working > (4 + 2) * (2**27 // 64000) * 64000
    assert used.total == pytest.approx(
        1.05 * (18 * count + used.activations + used.logits + used.working) + 2 * GIB, rel=1e-3
    )


def test_the_optimizer_is_divided_over_data_and_context_ranks() -> None:
    model = preset("4B")
    for layout in (Layout(data=4), Layout(data=2, context=2)):
        whole = memory(Workload(model, distributed_optimizer=False), layout)
        assert memory(Workload(model), layout).optimizer == whole.optimizer / 4


def test_recomputation_saves_memory_and_costs_time() -> None:
    work = Workload(preset("12B"))
    keep, again = (Layout(8, sequence_parallel=True, recompute=flag) for flag in (False, True))
    assert memory(work, again).activations < 0.1 * memory(work, keep).activations
    ratio = speed.speed(work, again, H100).step_seconds / speed.speed(work, keep, H100).step_seconds
    # A third more computation except in the output layer, and half as many transfers again.
    assert 4 / 3 < ratio < 3 / 2


def test_a_pipeline_keeps_as_many_clips_as_it_has_stages() -> None:
    work = Workload(preset("4B"))
    first, last = (stage_memory(work, Layout(pipeline=4), stage) for stage in (0, 3))
    assert first.activations == pytest.approx(4 * last.activations, rel=0.05)
    # The softmax is the last stage's, and kept where the vocabulary is small.
    few = Workload(preset("4B", vocab_size=1024))
    assert [stage_memory(few, Layout(pipeline=4), stage).logits for stage in (0, 3)] == [
        0,
        4 * 12800 * 1024,
    ]
    # With fewer clips than stages there is nothing more to keep.
    single = Workload(preset("4B"), global_batch_size=1)
    assert stage_memory(single, Layout(pipeline=4), 0).activations == first.activations / 4


def test_an_interleaved_pipeline() -> None:
    """Stages wait less and keep more: Megatron's warm-up, in parts of a micro-batch."""
    work = Workload(preset("4B"), global_batch_size=8)
    plain, cut = Layout(pipeline=4), Layout(pipeline=4, virtual=2)
    kept = [
        stage_memory(work, cut, stage).activations * 4 / stage_memory(work, plain, 0).activations
        for stage in (0, 1)
    ]
    assert kept[0] == pytest.approx((2 * 3 + 4 + 1) / 2)
    assert kept[1] == pytest.approx((2 * 2 + 4 + 1) / 2, rel=1e-3)
    few = dataclasses.replace(work, global_batch_size=4)
    assert stage_memory(few, cut, 0).activations == stage_memory(work, plain, 0).activations
    times = [speed.speed(work, layout, H100) for layout in (plain, cut)]
    assert times[1].step_seconds / times[0].step_seconds == pytest.approx((8 + 1.5) / (8 + 3))
    assert times[1].bubble == pytest.approx(1.5 / 9.5)


def test_the_update_of_gradients_in_bf16() -> None:
    """Half the buffer; the optimizer's copy in float32 comes and goes."""
    layout = Layout(tensor=8, recompute=True)
    usual, less = (
        memory(Workload(preset("12B"), grad_reduce_in_bf16=flag), layout) for flag in (False, True)
    )
    assert less.gradients == usual.gradients / 2
    updated = usual.gradients / 4
    assert less.working + less.activations + less.logits == pytest.approx(8 * updated)


def test_heads_alone_are_trained_in_less_time() -> None:
    """The frozen backbone only goes forward: a third of a full run, and what the heads take."""
    model = dataclasses.replace(preset("4B"), num_medusa_heads=2)
    alone, whole, plain = (
        flops_per_token(model, True),
        flops_per_token(model),
        flops_per_token(preset("4B")),
    )
    square, logits = 2 * 4096**2, 2 * 4 * 64000 * 4096
    assert whole == pytest.approx(plain + 6 * square + logits)
    assert alone == pytest.approx(plain / 3 + 4 * square + logits)
    for heads_alone, flops in ((True, alone), (False, whole)):
        work = Workload(model, heads_alone=heads_alone)
        seconds = speed.speed(work, Layout(), H100).step_seconds
        assert seconds == pytest.approx(32 * 12800 * flops / (0.4 * 989e12))


def test_float32_is_slower() -> None:
    work = Workload(preset("4B"), dtype="float32")
    gpu = speed.hardware("H100", 0.4, dtype="float32")
    assert speed.speed(work, Layout(), gpu).tokens_per_second == pytest.approx(
        0.4 * 67e12 / flops_per_token(preset("4B"))
    )


def test_speed_is_the_training_metrics_formula() -> None:
    """One GPU without recomputation reaches the stated share of its peak."""
    work = Workload(preset("4B"))
    result = speed.speed(work, Layout(), H100)
    assert result.mfu == pytest.approx(0.4)
    assert result.tokens_per_second == pytest.approx(
        0.4 * 989e12 / flops_per_token(preset("4B")), rel=1e-9
    )
    flops = speed.token_flops(preset("4B"))
    assert flops.attention == 6 * 16 * 4096 * 12800
    assert flops.layers + flops.attention + flops.output == flops_per_token(preset("4B"))


def test_the_bubble() -> None:
    work = Workload(preset("4B"), global_batch_size=6)
    result = speed.speed(work, Layout(pipeline=4), H100)
    assert result.bubble == pytest.approx(3 / 9)
    balanced = speed.speed(work, Layout(), H100).step_seconds / 4
    assert result.step_seconds > balanced * 9 / 6


def test_every_layout_can_be_trained() -> None:
    """What the search yields, the trainer's own checks accept."""
    work = Workload(preset("12B"), global_batch_size=16)
    found = list(layouts.possible_layouts(work, 16, 8))
    assert len(found) == len(set(found)) > 20
    for layout in found:
        assert layout.num_gpus == 16
        assert layout.tensor * layout.context <= 8
        work.model.check_tensor_parallel(layout.tensor)
        work.model.check_pipeline_parallel(layout.pipeline)
        pieces = (layout.tensor if layout.sequence_parallel else 1) * (
            2 * layout.context if layout.context > 1 else 1
        )
        assert work.model.seq_length % pieces == 0
        assert work.global_batch_size % layout.data == 0
    assert Layout(8, 2, 1, 1, True, True) in found and Layout(1, 1, 1, 16) in found
    assert all(layout.sequence_parallel == (layout.tensor > 1) for layout in found)


def test_lengths_that_do_not_divide() -> None:
    """105 tokens: no context parallelism, no sequence parallelism, but tensor parallelism."""
    model = dataclasses.replace(preset("4B"), latent_shape=LatentShape(3, 5, 7))
    found = list(layouts.possible_layouts(Workload(model), 4, 8))
    assert {layout.context for layout in found} == {1}
    assert {layout.tensor for layout in found} == {1, 2, 4}
    assert not any(layout.sequence_parallel for layout in found)


def test_fitting_layouts_are_ordered_by_speed() -> None:
    fitting, smallest = layouts.search(Workload(preset("4B")), cluster(8))
    rates = [candidate.speed.tokens_per_second for candidate in fitting]
    assert rates == sorted(rates, reverse=True)
    assert all(candidate.memory.total <= 80 * GIB for candidate in fitting)
    assert smallest.memory.total == min(candidate.memory.total for candidate in fitting)
    # Less memory than the fastest layout needs: another one is recommended.
    limit = fitting[0].memory.total / GIB - 1
    fewer, _ = layouts.search(Workload(preset("4B")), cluster(8, limit))
    assert 0 < len(fewer) < len(fitting) and fewer[0].layout != fitting[0].layout


def test_refusal_names_what_would_do() -> None:
    work = Workload(preset("12B"))
    fitting, smallest = layouts.search(work, cluster(2))
    assert fitting == []
    text = str(layouts.refusal("12B", work, cluster(2), smallest))
    number = layouts.least_gpus(work, cluster(2).usable_bytes, 8)
    assert number is not None and f"at least {number} GPUs of 80 GB" in text
    assert layouts.search(work, cluster(number))[0]
    assert not any(
        memory(work, layout).total <= cluster(2).usable_bytes
        for fewer in range(1, number)
        for layout in layouts.possible_layouts(work, fewer, 8)
    )
    gigabytes = int(text.split(" or 2 of ")[1].split()[0])
    assert layouts.search(work, cluster(2, gigabytes))[0]
    assert not layouts.search(work, cluster(2, gigabytes - 1))[0]


def test_no_layout_at_all() -> None:
    with pytest.raises(ConfigError, match="no layout of 7 GPUs"):
        layouts.search(Workload(preset("4B")), cluster(7))


def make_plan(num_gpus: int, name: str = "4B") -> report.TrainingPlan:
    work, gpus = Workload(preset(name)), cluster(num_gpus)
    fitting, _ = layouts.search(work, gpus)
    return report.TrainingPlan(name, report.Settings("some/model"), work, gpus, fitting)


@pytest.mark.parametrize("num_gpus", [1, 8, 16])
def test_the_command_line_is_one_of_the_training_script(num_gpus: int) -> None:
    plan = make_plan(num_gpus)
    for candidate in plan.candidates:
        line = report.command(plan, candidate.layout)
        launcher, _, arguments = line.partition(" train_general.py ")
        config: Any = parse(TrainConfig, FLAGS, shlex.split(arguments), "train", "")
        validate(config, num_gpus)
        parallel, layout = config.parallel, candidate.layout
        assert parallel.tensor_model_parallel_size == layout.tensor
        assert parallel.pipeline_model_parallel_size == layout.pipeline
        assert parallel.context_parallel_size == layout.context
        assert parallel.sequence_parallel == layout.sequence_parallel
        assert config.model.recompute == layout.recompute
        assert (config.micro_batch_size, config.global_batch_size) == (1, 32)
        assert (config.model.path, config.model.dtype) == ("some/model", "bfloat16")
        assert ("--nnodes 2 --nproc-per-node 8" in launcher) == (num_gpus == 16)


def test_the_script_of_video2world() -> None:
    plan = make_plan(8, "5B-Video2World")
    line = report.command(plan, plan.candidates[0].layout)
    assert " train_video2world.py --model_path some/model " in line


@pytest.mark.parametrize("frozen", [True, False])
def test_flags_of_the_training_script(
    frozen: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = "--ema_decay 0.999 --async_save --medusa_num_heads 2 --json".split()
    arguments += ["--grad_reduce_in_bf16", *["--no-medusa_freeze_backbone"] * (not frozen)]
    plan = json.loads(run_main(arguments, monkeypatch, capsys))
    arguments = shlex.split(plan["command"].partition(".py ")[2])
    config: Any = parse(TrainConfig, FLAGS, arguments, "train", "")
    validate(config, 8)
    assert (config.optimizer.ema_decay, config.async_save) == (0.999, True)
    assert config.optimizer.grad_reduce_in_bf16
    assert config.model.num_medusa_heads == 2
    assert config.model.medusa_freeze_backbone == frozen
    layout, heads = plan["recommended"]["layout"], 2 * preset("4B").hidden_size ** 2
    assert layout["context"] == 1 and (layout["pipeline"] == 1 or not frozen)
    trained = heads if frozen else plan["parameters"]["total"]
    assert plan["checkpoint_bytes"] == 2 * plan["parameters"]["total"] + 16 * trained
    assert plan["recommended"]["memory_bytes"]["gradients"] == 2 * trained / layout["tensor"] or (
        layout["tensor"] > 1
    )


def test_the_optimizer_in_host_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """4B on one GPU that could not hold its optimizer; the command line asks for it."""
    words = "--model 4B --gpus 1 --gpu_memory_gb 40 --global_batch_size 2 --json".split()
    words.append("--optimizer_cpu_offload")
    plan = json.loads(run_main(words, monkeypatch, capsys))
    number, found = plan["parameters"]["total"], plan["recommended"]
    assert found["memory_bytes"]["optimizer"] == 0 and found["offloaded_bytes"] == 16 * number
    assert "--optimizer_cpu_offload" in plan["command"]
    assert "--optimizer_offload_fraction" not in plan["command"]
    words += ["--optimizer_offload_fraction", "0.75", "--gpu_memory_gb", "80"]
    plan = json.loads(run_main(words, monkeypatch, capsys))
    found = plan["recommended"]
    assert found["memory_bytes"]["optimizer"] == 3 * number
    assert found["offloaded_bytes"] == 12 * number
    arguments = shlex.split(plan["command"].partition(".py ")[2])
    config: Any = parse(TrainConfig, FLAGS, arguments, "train", "")
    validate(config, 1)
    assert config.optimizer.offloaded_share == 0.75
    words.remove("--optimizer_cpu_offload")
    with pytest.raises(ConfigError, match="has no effect without --optimizer_cpu_offload"):
        run_main(words, monkeypatch, capsys)


def test_the_reserve() -> None:
    """What is named leaves the reserve free, to the byte; another can be asked for."""
    work = Workload(preset("4B"))
    best = layouts.search(work, cluster(8))[0][0]
    exactly = best.memory.total / (1 - layouts.RESERVE)
    for memory_bytes, fits in ((exactly + 1, True), (exactly - 1, False)):
        found, _ = layouts.search(work, dataclasses.replace(cluster(8), memory_bytes=memory_bytes))
        assert (best in found) == fits
    whole = dataclasses.replace(cluster(8), memory_bytes=best.memory.total, reserve=0.0)
    assert best in layouts.search(work, whole)[0]


def run_main(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> str:
    monkeypatch.setattr("sys.argv", ["plan", *arguments])
    assert command_line.main() == 0
    return capsys.readouterr().out


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments = "--model 12B --gpus 8 --gpu_memory_gb 80 --latent_shape 5,20,32 --json".split()
    plan = json.loads(run_main(arguments, monkeypatch, capsys))
    assert plan["parameters"]["total"] == preset("12B").num_parameters
    assert plan["seq_length"] == 3200
    assert plan["recommended"] == plan["layouts"][0]
    used = plan["recommended"]["memory_bytes"]
    assert used.pop("total") == pytest.approx(sum(used.values()), abs=10)
    assert plan["command"].startswith("torchrun --standalone --nproc-per-node 8 train_general.py")


def test_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    arguments = "--model tiny --gpus 2 --gpu A100 --gpu_memory_gb 24 --vocab_size 2000".split()
    text = run_main([*arguments, "--no-distributed_optimizer"], monkeypatch, capsys)
    assert "18,432 of them only pad the vocabulary" in text
    assert "…" not in text, "a column was cut"
    assert "only a comparison" in text
    assert text.strip().splitlines()[-1].startswith("torchrun")
    assert "--model_path random:tiny" in text


@pytest.mark.parametrize("name", ["4B", "12B"])
def test_the_documentation_shows_what_is_printed(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    page = Path(__file__).resolve().parents[2].joinpath("docs", "plan.md").read_text()
    shown = {line.rstrip() for line in page.splitlines()}
    arguments = f"--model {name} --gpus 8 --gpu_memory_gb 80 --latent_shape 5,40,64".split()
    printed = {line.rstrip() for line in run_main(arguments, monkeypatch, capsys).splitlines()}
    assert printed - shown == set()


def test_models_from_files(tmp_path: Path) -> None:
    reference = tmp_path / "config.json"
    reference.write_text(json.dumps(to_reference(preset("12B"))))
    assert command_line.read_model(str(reference)) == (preset("12B"), str(tmp_path))
    assert command_line.read_model(str(tmp_path)) == (preset("12B"), str(tmp_path))
    ours = tmp_path / "model.json"
    ours.write_text(json.dumps(preset("5B-Video2World").to_json()))
    assert command_line.read_model(str(ours))[0] == preset("5B-Video2World")
    assert command_line.read_model("12B")[1] == "nvidia/Cosmos-1.0-Autoregressive-12B"
    assert command_line.read_model("random:4B") == (preset("4B"), "random:4B")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--gpus 0 --mfu 2", "--gpus 0 must be at least 1; --mfu 2"),
        ("--gpus 12", "multiple of --gpus_per_node 8"),
        ("--gpu V100 --gpu_memory_gb 32", "--peak_tflops"),
        ("--gpu V100 --peak_tflops 112", "give --gpu_memory_gb"),
        ("--model 7B", "7B does not exist"),
        ("--latent_shape 5,40", "latent shape"),
        ("--global_batch_size 1 --micro_batch_size 2", "no layout"),
        ("--gpu_memory_gb -1", "must be above 0"),
        ("--gpus 100000000", "must be at most 100000"),
        ("--gpus 2 --gpus_per_node 100000000 --gpu_memory_gb 1", "must be at most 1000"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    from cosmos_posttrain.launch import run_cli

    monkeypatch.setattr("sys.argv", ["plan", *arguments.split()])
    with pytest.raises(SystemExit) as caught:
        run_cli(command_line.main)
    output = SimpleNamespace(**capsys.readouterr()._asdict())
    assert caught.value.code == 2
    assert output.out == "" and sentence in output.err and output.err.count("\n") == 1


def test_the_refusal_as_a_process() -> None:
    arguments = "--model 12B --gpus 2 --gpu_memory_gb 80 --latent_shape 5,40,64 --json".split()
    finished = run_script(["-m", "cosmos_posttrain.plan", *arguments], timeout_seconds=60)
    assert finished.returncode == 2 and finished.stdout == ""
    lines = [line for line in finished.stderr.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith(
        "error: 12B cannot be trained on 2 GPUs of 80 GB"
    )


def test_help_needs_no_torch() -> None:
    """Which is what makes it quick: 0.1 s."""
    command = ["-X", "importtime", "-m", "cosmos_posttrain.plan", "--help"]
    finished = run_script(command, timeout_seconds=60)
    assert finished.returncode == 0 and "--gpu_memory_gb" in finished.stdout
    imported = {line.rpartition("|")[2].strip() for line in finished.stderr.splitlines()}
    assert "cosmos_posttrain.cli" in imported
    assert not {"torch", "megatron", "numpy", "rich"} & imported


def test_lora_on_one_gpu() -> None:
    """4B fits 24 GB with recomputation and 80 GB without; the shipped config says the same."""
    config = merge(TrainConfig, Path(__file__).parents[2] / "configs" / "train_4b_lora.yaml")
    settings = config.model
    config.data.path = settings.cooccurrence_path = "x"
    validate(config, world_size=1)
    lora = lora_for(preset("4B"), settings.lora_rank, settings.lora_alpha, None)
    model = dataclasses.replace(preset("4B"), lora=lora)
    work = Workload(model, global_batch_size=config.global_batch_size, dtype=settings.dtype or "")
    needed = [memory(work, Layout(recompute=flag)).total / GIB for flag in (True, False)]
    assert needed[0] < 24 < 40 < needed[1] < 80 and settings.recompute
    whole = memory(Workload(preset("4B")), Layout(recompute=True)).total / GIB
    assert whole > 70
    rows, factors = 2 * 64000 * 4096, num_lora_parameters(model)
    assert rank_trained_parameters(model, 1, 1, 0) == rows + factors
    # Tensor parallelism divides one of each two factors; the pipeline the layers.
    halves = [rank_trained_parameters(model, 2, 2, stage) for stage in (0, 1)]
    assert sum(halves) == rows / 2 + sum(
        model.num_layers * 16 * (b + a / 2 if name in ROW_PARALLEL else b / 2 + a)
        for name, b, a in target_shapes(model, LoraConfig(16, 1, BASE_TARGETS))
    )
