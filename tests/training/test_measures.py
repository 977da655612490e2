"""What a validation and a step measure, against plain arithmetic, and at every layout."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.prepared import make_videos, prepare_small
from helpers.prompts import prepare_prompts, write_lines
from helpers.run_case import make_config, run

from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.inference.engine import generate
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.training.callbacks.validate import Validate
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.metrics import jitter
from cosmos_posttrain.training.sample_clips import SampleMaker
from cosmos_posttrain.training.trainer import Trainer

LAYOUTS: tuple[dict[str, Any], ...] = (
    {"parallel__tensor_model_parallel_size": 2},
    {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True},
    {"parallel__pipeline_model_parallel_size": 2},
    {
        "parallel__pipeline_model_parallel_size": 2,
        "parallel__virtual_pipeline_model_parallel_size": 2,
    },
    {"parallel__context_parallel_size": 2},
    {},  # data parallel
)
# Of a step's row, what depends on no clock.
NUMBERS = ("reduced_train_loss", "grad_norm", "grad_norm_embedding", "param_norm")


@pytest.fixture(scope="module")
def even_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips of 3x2x4 tokens, which two context-parallel ranks can share."""
    folder = tmp_path_factory.mktemp("even_clips")
    (folder / "videos").mkdir()
    prepare_small(make_videos(folder / "videos", num_videos=6), folder / "tokens", width=32)
    return folder / "tokens"


@pytest.fixture(scope="module")
def start(even_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt a little, so that some of its guesses are right."""
    log_dir = tmp_path_factory.mktemp("start") / "run"
    run(make_config(even_clips, log_dir, max_steps=12, limit_val_batches=0))
    return log_dir


def config_of(tokens: Path, start: Path, log_dir: Path, **changes: Any) -> TrainConfig:
    return make_config(
        tokens, log_dir, model__path=str(start), max_steps=5, data__split_string="1,1,0", **changes
    )


def measured(configs: list[TrainConfig]) -> list[dict[str, Any]]:
    """Validation, generated clips (where the layout can) and a step, each from the same weights."""
    found = []
    for config in configs:
        trainer = Trainer(config)
        (validate,) = (item for item in trainer.callbacks if isinstance(item, Validate))
        row: dict[str, Any] = validate._validation.figures()
        sizes = config.parallel
        if sizes.pipeline_model_parallel_size == sizes.context_parallel_size == 1:
            data = trainer.inputs.val_data
            assert data is not None
            clips = SampleMaker(trainer.ddp, data, trainer.layout, 3, 1).make()
            row["clips"] = torch.stack(
                [torch.stack([clip.truth, clip.generated, clip.preview]) for clip in clips]
            )
        step = trainer.train_step(next(trainer.batches()))
        row |= {key: step[key] for key in NUMBERS}
        trainer.close()
        groups.shutdown()
        found.append(row)
    return found


@pytest.fixture(scope="module")
def alone(
    even_clips: Path, start: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("alone")
    return measured([config_of(even_clips, start, folder / "run")])[0]


def test_validation_figures_are_those_of_whole_logits(
    even_clips: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits are made seven positions at a time, and the last batch is not full."""
    from cosmos_posttrain.models import config as model_config

    monkeypatch.setitem(model_config.LOGITS_AT_ONCE, "cpu", 7 * 64)
    trainer = Trainer(config_of(even_clips, start, tmp_path / "run", micro_batch_size=4))
    (validate,) = (item for item in trainer.callbacks if isinstance(item, Validate))
    found = validate._validation.figures()
    data = TokenDataset(even_clips, "validation", "1,1,0")
    assert len(data) % 4
    model = ARModel(trainer.model)
    losses, right = [], []
    for number in range(len(data)):
        logits, labels = model.logits(data[number][None])[0, :-1].double(), data[number][1:]
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none"))
        right.append((logits.argmax(-1) == labels).double())
    nats = torch.stack(losses)
    trainer.close()
    assert found["val_loss"] == pytest.approx(float(nats.mean()), rel=1e-6)
    assert found["val_bits_per_token"] == pytest.approx(float(nats.mean()) / math.log(2), rel=1e-6)
    assert found["val_top_1"] == pytest.approx(float(torch.stack(right).mean())) and right
    assert 0 < found["val_top_1"] < 1
    for frame, columns in enumerate((slice(0, 7), slice(7, 15), slice(15, 23))):
        expected = float(nats[:, columns].mean())
        assert found[f"val_loss_latent_{frame}"] == pytest.approx(expected, rel=1e-6)


def test_given_latents_have_no_figure(even_clips: Path, start: Path, tmp_path: Path) -> None:
    config = config_of(even_clips, start, tmp_path / "run", num_condition_latents=1)
    found = measured([config])[0]
    assert "val_loss_latent_0" not in found
    mean = (found["val_loss_latent_1"] + found["val_loss_latent_2"]) / 2
    assert found["val_loss"] == pytest.approx(mean)


def test_clips_with_a_text(tmp_path: Path) -> None:
    """``<bov>`` stands before them, and padding behind."""
    (tmp_path / "videos").mkdir()
    prepare_prompts(write_lines(tmp_path / "videos"), tmp_path / "tokens")
    config = make_config(
        tmp_path / "tokens", tmp_path / "run", model__path="random:tiny-video2world"
    )
    trainer = Trainer(config, takes_text=True)
    (validate,) = (item for item in trainer.callbacks if isinstance(item, Validate))
    found = validate._validation.figures()
    data = trainer.inputs.val_data
    assert data is not None
    clips = SampleMaker(trainer.ddp, data, trainer.layout, 2, 1).make()
    model, losses = ARModel(trainer.model), []
    bov = torch.tensor([model.config.bov_token])
    for number, clip in enumerate(clips):
        text = data.context(number)
        assert text is not None
        tokens, given = data[number], clip.truth[0].numel()
        logits = model.logits(torch.cat([bov, tokens])[None, :-1], text[None])[0]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens, reduction="none"))
        assert torch.equal(clip.preview.flatten()[given:], logits.argmax(-1)[given:])
        prompt = torch.cat([bov, tokens[:given]])[None]
        made = generate(
            model, prompt, len(tokens) - given, top_p=0.8, items=[number], context=text[None]
        )
        assert torch.equal(clip.generated.flatten()[given:], made[0])
    trainer.close()
    assert len(clips) == len(data)
    nats = torch.stack(losses).view(len(clips), clips[0].truth.shape[0], -1).double()
    assert found["val_loss"] == pytest.approx(float(nats.mean()), rel=1e-5)
    for frame, mean in enumerate(nats.mean((0, 2)).tolist()):
        assert found[f"val_loss_latent_{frame}"] == pytest.approx(mean, rel=1e-5)


@pytest.mark.slow
@pytest.mark.distributed
def test_every_layout_measures_and_generates_the_same(
    even_clips: Path, start: Path, alone: dict[str, Any], tmp_path: Path
) -> None:
    configs = [
        config_of(even_clips, start, tmp_path / str(number), **layout)
        for number, layout in enumerate(LAYOUTS)
    ]
    for ranks in zip(*run_distributed(measured, 2, configs), strict=True):
        for row in ranks:
            for key in alone.keys() - {"clips"}:
                # Sums in another order.
                assert row[key] == pytest.approx(alone[key], rel=1e-5), key
            if "clips" in row:
                assert torch.equal(row["clips"], alone["clips"])


def test_norms_are_those_of_the_parameters(even_clips: Path, start: Path, tmp_path: Path) -> None:
    trainer = Trainer(config_of(even_clips, start, tmp_path / "run", optimizer__clip_grad=0))
    weights = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    row = trainer.train_step(next(trainer.batches()))
    gradients = {name: value.main_grad for name, value in trainer.model.named_parameters()}
    of_rows = [
        value for name, value in gradients.items() if "embedding" in name or "output" in name
    ]
    trainer.close()

    def norm(tensors: Any) -> float:
        return float(torch.cat([tensor.double().flatten() for tensor in tensors]).norm())

    assert len(of_rows) == 2
    assert row["grad_norm"] == pytest.approx(norm(gradients.values()), rel=1e-5)
    assert row["grad_norm_embedding"] == pytest.approx(norm(of_rows), rel=1e-5)
    assert row["param_norm"] == pytest.approx(norm(weights.values()), rel=1e-5)


def test_jitter_is_one_where_all_steps_are_alike() -> None:
    assert jitter(deque([0.5] * 20)) == 1
    assert jitter(deque([1.0] * 18 + [3.0] * 2)) == 3
    assert jitter(deque([2.0])) == 1
