"""Weights that come behind the next forward pass are the same ones, wherever they are read."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.prepared import make_videos, prepare_small
from helpers.run_case import make_config

from cosmos_posttrain import launch, load_model
from cosmos_posttrain.training.config import TrainConfig

pytestmark = pytest.mark.distributed

CASES: dict[str, dict[str, Any]] = {
    "all": {"optimizer__ema_decay": 0.9},
    "lora": {"model__lora_rank": 2},
    "medusa": {"model__num_medusa_heads": 2, "model__medusa_freeze_backbone": False},
    "recompute": {"model__recompute": True},
}
# Of the shipped configs for several GPUs: processes, and settings.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tensor": (
        4,
        {
            "parallel__tensor_model_parallel_size": 2,
            "parallel__sequence_parallel": True,
            "async_save": True,
        },
    ),
    "context": (2, {"parallel__context_parallel_size": 2}),
}


def use_small_buckets() -> None:
    """Each weight in a bucket of its own; one of the usual size would hold the whole model."""
    from cosmos_posttrain.training import building

    whole = building.DistributedDataParallelConfig
    building.DistributedDataParallelConfig = functools.partial(whole, bucket_size=1)


def run_in_small_buckets(configs: list[TrainConfig]) -> None:
    from cosmos_posttrain.training.sample_clips import SampleMaker
    from cosmos_posttrain.training.trainer import Trainer

    use_small_buckets()
    for config in configs:
        trainer = Trainer(config)
        if config.parallel.overlap_param_gather:
            assert len(trainer.ddp.bucket_groups) > 5
        trainer.fit()
        trainer.train_step(next(trainer.batches()))
        assert differs_between_ranks(trainer.model) == config.parallel.overlap_param_gather
        differs: list[bool] = []

        def look(_place: str, model: Any = trainer.model, found: list[bool] = differs) -> None:
            found.append(differs_between_ranks(model))

        clips = SampleMaker(trainer.ddp, trainer.train_data, trainer.layout, 2, 1).make(look)
        assert differs == [False]  # before the first clip of this rank
        if launch.is_rank_zero():
            torch.save(
                [torch.stack([clip.preview, clip.generated]) for clip in clips],
                Path(config.log_dir) / "samples.pt",
            )
        trainer.close()


def differs_between_ranks(model: torch.nn.Module) -> bool:
    """Whether the two ranks have other weights."""
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    largest = weights.clone()
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX)
    differ = torch.tensor(float(not torch.equal(largest, weights)))
    torch.distributed.all_reduce(differ, op=torch.distributed.ReduceOp.MAX)
    return bool(differ)


def rows(run: Path) -> list[list[float]]:
    """Losses, norms and validation of each step."""
    lines = (run / "default" / "metrics.jsonl").read_text().splitlines()
    names = ("loss", "norm", "val_", "lr")
    return [[v for k, v in json.loads(x).items() if any(n in k for n in names)] for x in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(run).module.named_parameters())


@pytest.mark.parametrize(
    "case",
    [name if name == "all" else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_nothing_changes(tokens: Path, tmp_path: Path, case: str) -> None:
    settings = {"max_steps": 5, "save_every_n_steps": 3, "val_check_interval": 2} | CASES[case]
    plain, late = tmp_path / "plain", tmp_path / "late"
    configs = [
        make_config(tokens, run, **settings, parallel__overlap_param_gather=run is late)
        for run in (plain, late)
    ]
    run_distributed(run_in_small_buckets, 2, configs)
    assert_same(plain, late)
    first, second = (torch.load(run / "samples.pt") for run in (plain, late))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def assert_same(plain: Path, late: Path) -> None:
    """Numbers of the steps, and weights at the end."""
    assert len(rows(late)) == 5
    for row, expected in zip(rows(late), rows(plain), strict=True):
        # Norms are summed in other parts, and gradients clipped by them.
        assert row == pytest.approx(expected, rel=1e-5)
    before, after = weights(plain), weights(late)
    # A step that one rank had missed would be as large as the learning rate.
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)


def fit_in_small_buckets(configs: list[TrainConfig]) -> None:
    from cosmos_posttrain.training.trainer import Trainer

    use_small_buckets()
    for config in configs:
        trainer = Trainer(config)
        assert trainer.ddp.ddp_config.overlap_param_gather == config.parallel.overlap_param_gather
        trainer.fit()
        trainer.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_changes_in_the_layouts_of_the_configs(tmp_path: Path, name: str) -> None:
    (tmp_path / "videos").mkdir()
    prepare_small(make_videos(tmp_path / "videos"), tmp_path / "tokens", width=32)  # 3x2x4 tokens
    num_processes, settings = LAYOUTS[name]
    settings = {"max_steps": 5, "save_every_n_steps": 3, "val_check_interval": 2} | settings
    plain, late = tmp_path / "plain", tmp_path / "late"
    configs = [
        make_config(
            tmp_path / "tokens", run, **settings, parallel__overlap_param_gather=run is late
        )
        for run in (plain, late)
    ]
    run_distributed(fit_in_small_buckets, num_processes, configs)
    assert_same(plain, late)
