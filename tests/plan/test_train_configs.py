"""The shipped configs: built in their layouts on the meta device, held against the planner."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.distributed_run import REPOSITORY_DIR, run_distributed
from helpers.full_size_data import write_full_size_clips, write_full_size_prompts

from cosmos_posttrain.config import merge
from cosmos_posttrain.plan.dry_run import layout_of
from cosmos_posttrain.plan.layouts import GIB, RESERVE
from cosmos_posttrain.plan.looking import look_at_source
from cosmos_posttrain.plan.memory import Workload, checkpoint_bytes, host_bytes, memory
from cosmos_posttrain.plan.parameters import rank_parameters, rank_trained_parameters
from cosmos_posttrain.training.config import TrainConfig

CONFIGS_DIR = REPOSITORY_DIR / "configs"


class Case(NamedTuple):
    """A config, and the GPUs that its comments speak of."""

    size: str
    num_gpus: int
    gigabytes: int = 80

    @property
    def takes_text(self) -> bool:
        return self.size.endswith("Video2World")


CASES = {
    "train_4b_1gpu": Case("4B", 1, 140),
    "train_4b_lora": Case("4B", 1, 40),
    "train_4b_2gpu": Case("4B", 2),
    "train_4b": Case("4B", 8),
    "train_12b": Case("12B", 8),
    "train_12b_16gpu": Case("12B", 16),
    "train_12b_64gpu": Case("12B", 64),
    "train_5b_video2world": Case("5B-Video2World", 8),
    "train_13b_video2world": Case("13B-Video2World", 8),
}


def test_every_config_is_tried() -> None:
    found = {path.stem for path in CONFIGS_DIR.glob("train_*.yaml")}
    assert found == {*CASES, "train_tiny"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, str]:
    """Clips without and with prompts."""
    folder = tmp_path_factory.mktemp("data")
    return {
        False: str(write_full_size_clips(folder / "clips")),
        True: str(write_full_size_prompts(folder / "prompts")),
    }


def read(name: str, data_path: str, log_dir: str) -> TrainConfig:
    settings: list[tuple[str, Any]] = [("data.path", data_path), ("log_dir", log_dir)]
    if name == "train_4b_lora":  # its co-occurrence file is made of the user's own clips
        settings += [("model.embedding_init", "reset")]
    return merge(TrainConfig, CONFIGS_DIR / f"{name}.yaml", settings)


def build_on_meta(
    data: dict[bool, str], log_dir: str, names: list[str]
) -> dict[str, list[dict[str, int]]]:
    """In a process of its own: each config's model as rank 0 and each further stage hold it."""
    import torch
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from cosmos_posttrain import launch
    from cosmos_posttrain.distributed import groups
    from cosmos_posttrain.training import building, setup

    launch.device = lambda requested="auto": torch.device("meta")
    built: dict[str, list[dict[str, int]]] = {}
    for name in names:
        case = CASES[name]
        config = read(name, data[case.takes_text], log_dir)
        with contextlib.ExitStack() as closing:
            dry = setup.DryRun(case.num_gpus, look_at_source)
            inputs = setup.open_inputs(config, closing, case.takes_text, dry)
        pipeline = inputs.parallelism.pipeline
        for rank in range(0, case.num_gpus, case.num_gpus // pipeline):
            torch.distributed.init_process_group(
                "fake", rank=rank, world_size=case.num_gpus, store=FakeStore()
            )
            groups.initialize(inputs.parallelism)
            with torch.device("meta"):
                model = building.build(config, inputs.model_config, torch.bfloat16)
            parameters = list(model.parameters())
            built.setdefault(name, []).append(
                {
                    "stage": parallel_state.get_pipeline_model_parallel_rank(),
                    "data": parallel_state.get_data_parallel_world_size(),
                    "held": sum(p.numel() for p in parameters),
                    "trained": sum(p.numel() for p in parameters if p.requires_grad),
                    "samples": inputs.order.num_samples,
                    "validation": 0 if inputs.val_data is None else len(inputs.val_data),
                }
            )
            groups.shutdown()
    return built


@pytest.fixture(scope="module")
def built(
    data: dict[bool, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, int]]]:
    log_dir = str(tmp_path_factory.mktemp("runs") / "run")
    return run_distributed(build_on_meta, 1, data, log_dir, list(CASES))[0]


def workload(config: TrainConfig, model: Any) -> Workload:
    assert config.model.dtype is not None
    sizes = config.micro_batch_size, config.global_batch_size
    average = config.optimizer.ema_decay is not None
    return Workload(model, *sizes, config.model.dtype, keeps_average=average)


def model_of(config: TrainConfig) -> Any:
    from cosmos_posttrain.models.lora_shapes import lora_for

    model = look_at_source(config.model.path).config
    settings = config.model
    lora = lora_for(model, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
    return dataclasses.replace(model, lora=lora)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_a_config_builds_what_the_planner_counts(
    name: str, built: dict[str, list[dict[str, int]]], data: dict[bool, str], tmp_path: Path
) -> None:
    case = CASES[name]
    config = read(name, data[case.takes_text], str(tmp_path))
    model, layout = model_of(config), layout_of(config, case.num_gpus)
    assert config.model.path.endswith(f"-{case.size}")
    assert len(built[name]) == layout.pipeline
    for rank in built[name]:
        sizes = model, layout.tensor, layout.pipeline, rank["stage"]
        assert rank["held"] == rank_parameters(*sizes)
        assert rank["trained"] == rank_trained_parameters(*sizes)
        assert rank["data"] == layout.data
        # Ten clips of ten videos, 98:1:1.
        assert (rank["samples"], rank["validation"]) == (8, 1)


@pytest.mark.parametrize("name", CASES)
def test_a_config_fits_as_its_comment_says(name: str) -> None:
    case, text = CASES[name], (CONFIGS_DIR / f"{name}.yaml").read_text()
    config = read(name, "DATA", "LOG_DIR")
    layout = layout_of(config, case.num_gpus)
    work = workload(config, model_of(config))
    needed = memory(work, layout).total / GIB
    assert needed <= (1 - RESERVE) * case.gigabytes
    said = re.search(r"recompute: .*# about (\d+) of (\d+) GB", text)
    assert said is not None
    assert [int(number) for number in said.groups()] == [round(needed), case.gigabytes]
    if config.model.recompute:  # only where it must be
        whole = dataclasses.replace(layout, recompute=False)
        assert memory(work, whole).total / GIB > (1 - RESERVE) * case.gigabytes
    if config.keep_last_n is not None:
        disk = f"a checkpoint takes about {checkpoint_bytes(work) / 1e9:.0f} GB"
        assert disk in text
    if config.async_save or "async_save" in text:
        node = min(case.num_gpus, 8) * host_bytes(work, layout) / 1e9
        assert f"{node:.0f} GB of host memory a node" in text


@pytest.mark.parametrize("name", CASES)
def test_updated_weights_travel_behind_a_pass_wherever_they_travel(name: str) -> None:
    """Between the ranks that hold the same weights: data and context parallel ones."""
    config = read(name, "DATA", "LOG_DIR")
    layout = layout_of(config, CASES[name].num_gpus)
    assert config.parallel.overlap_param_gather == (layout.data * layout.context > 1)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.num_gpus > 1])
def test_a_config_names_its_command(name: str) -> None:
    case, text = CASES[name], (CONFIGS_DIR / f"{name}.yaml").read_text()
    command = text.partition("Start with")[2].partition("model:")[0]
    script = "train_video2world.py" if case.takes_text else "train_general.py"
    assert f"{script} --config configs/{name}.yaml" in command
    nodes = re.search(r"--nnodes (\d+)", command)
    per_node = re.search(r"--nproc-per-node (\d+)", command)
    assert per_node is not None
    assert int(per_node[1]) * int(nodes[1] if nodes else 1) == case.num_gpus
