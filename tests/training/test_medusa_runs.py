"""Runs with Medusa heads: what is trained, at every layout, resumed, converted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.run_case import losses, make_config, run

from cosmos_posttrain import load_model
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.errors import ConfigError


@pytest.fixture(scope="module")
def backbone(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ten steps, without heads."""
    log_dir = tmp_path_factory.mktemp("backbone") / "run"
    run(make_config(tokens, log_dir, max_steps=10))
    return log_dir


@pytest.fixture(scope="module")
def heads(tokens: Path, backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two heads on it, trained alone: checkpoints after 10 and 20 steps."""
    log_dir = tmp_path_factory.mktemp("heads") / "run"
    run(heads_config(tokens, log_dir, backbone))
    return log_dir


def heads_config(tokens, log_dir, start, **changes):
    return make_config(
        tokens, log_dir, model__path=str(start), model__num_medusa_heads=2, **changes
    )


def weights_of(run: Path, **settings) -> dict[str, torch.Tensor]:
    named = load_model(run, **settings).module.named_parameters()
    return {name: parameter.detach() for name, parameter in named}


def test_heads_alone_learn_and_nothing_else_changes(backbone: Path, heads: Path) -> None:
    curve = losses(heads)
    assert sum(curve[-5:]) < 0.98 * sum(curve[:5])
    before, after = weights_of(backbone), weights_of(heads)
    assert after.keys() - before.keys() == {"medusa_heads.0.weight", "medusa_heads.1.weight"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(float(after[f"medusa_heads.{n}.weight"].abs().max()) > 1e-3 for n in range(2))
    (written,) = (heads / "default" / "checkpoints").glob("*step=19/context/model.json")
    assert json.loads(written.read_text())["num_medusa_heads"] == 2


def test_loss_is_the_papers(tokens: Path, backbone: Path) -> None:
    """Head k at place s is held against the token at s + k + 1; weights 0.8^k."""
    model = load_model(backbone)
    batch = torch.randint(0, 64, (2, 18), generator=torch.Generator().manual_seed(1))
    labels = batch.roll(-1, 1)
    wanted = torch.zeros(2, 18)
    # A fresh head guesses what the model does.
    scores = model.logits(batch).log_softmax(-1)
    for number in (1, 2):
        own = scores[:, : 18 - number].gather(2, labels[:, number:, None])[..., 0]
        wanted[:, number:] -= 0.8**number * own
    from cosmos_posttrain.models.medusa import MedusaHead, head_losses

    module = model.module
    ahead = torch.nn.ModuleList(MedusaHead(module.config) for _ in range(2))
    with module.hidden_states_only(), torch.no_grad():
        hidden = module(batch, None, None)
    found = head_losses(ahead, hidden, module.output_layer.weight, labels, 64, False)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize("freezes", [True, False], ids=["frozen", "joint"])
def test_tensor_parallel_gives_the_same_curve(
    tokens: Path, backbone: Path, tmp_path: Path, freezes: bool
) -> None:
    settings = {"max_steps": 6, "model__medusa_freeze_backbone": freezes}
    run(heads_config(tokens, tmp_path / "one", backbone, **settings))
    settings |= {
        "parallel__tensor_model_parallel_size": 2,
        "parallel__sequence_parallel": True,
    }
    run_distributed(run, 2, heads_config(tokens, tmp_path / "two", backbone, **settings))
    pairs = zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True)
    assert max(abs(a - b) / a for a, b in pairs) < 1e-4
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-4, rtol=1e-3)


def test_resume_equals_uninterrupted(tokens: Path, backbone: Path, heads: Path, tmp_path) -> None:
    other = tmp_path / "run"
    shutil.copytree(heads, other)
    (last,) = (other / "default" / "checkpoints").glob("*step=19")
    shutil.rmtree(last)
    with pytest.raises(ConfigError, match="has 2 Medusa heads, not 0"):
        run(make_config(tokens, other, model__path=str(backbone)))
    with pytest.raises(ConfigError, match="began with its backbone frozen; give --medusa_freeze"):
        run(heads_config(tokens, other, backbone, model__medusa_freeze_backbone=False))
    run(heads_config(tokens, other, backbone))
    assert losses(other) == losses(heads)
    first, second = weights_of(heads), weights_of(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_third_head_beside_two_and_none(
    tokens: Path, heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 1, "optimizer__lr": 1e-9, "optimizer__weight_decay": 0.0}
    run(
        make_config(
            tokens, tmp_path / "3", model__path=str(heads), model__num_medusa_heads=3, **settings
        )
    )
    assert (
        "3 Medusa heads, 2 of them the checkpoint's, are trained alone" in capsys.readouterr().out
    )
    before, after = weights_of(heads), weights_of(tmp_path / "3")
    for number in range(2):
        name = f"medusa_heads.{number}.weight"
        torch.testing.assert_close(before[name], after[name], atol=1e-7, rtol=0)
    assert float(after["medusa_heads.2.weight"].abs().max()) < 1e-7
    run(make_config(tokens, tmp_path / "0", model__path=str(heads), **settings))
    assert "the model's 2 Medusa heads are left out" in capsys.readouterr().out
    assert not any("medusa" in name for name in weights_of(tmp_path / "0"))


def test_validation_of_a_joint_run_is_the_models_own(tokens: Path, tmp_path: Path) -> None:
    """Heads that do not learn change nothing in the validation loss, but in the training loss."""
    settings = {"max_steps": 1, "optimizer__lr": 1e-12}
    run(make_config(tokens, tmp_path / "plain", **settings))
    settings |= {"model__num_medusa_heads": 2, "model__medusa_freeze_backbone": False}
    run(make_config(tokens, tmp_path / "joint", **settings))
    plain, joint = (
        json.loads((tmp_path / name / "default" / "metrics.jsonl").read_text())
        for name in ("plain", "joint")
    )
    assert joint["val_loss"] == pytest.approx(plain["val_loss"], rel=1e-6)
    assert joint["reduced_train_loss"] > 1.1 * plain["reduced_train_loss"]


def test_conversions_keep_or_name_the_heads(
    heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(
        CheckpointConversionConfig(
            source=str(heads), target=str(tmp_path / "m"), target_format="megatron", verify=True
        )
    )
    first, second = weights_of(heads), weights_of(tmp_path / "m")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "Medusa" not in capsys.readouterr().out
    convert(
        CheckpointConversionConfig(
            source=str(heads), target=str(tmp_path / "p"), target_format="pt", verify=True
        )
    )
    assert "pt has no place for the 2 Medusa heads; they are left out." in capsys.readouterr().out
    assert open_source(tmp_path / "p").config.num_medusa_heads == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "has fresh weights, from which frozen no head can learn"),
        ({"parallel__context_parallel_size": 2}, "needs --context_parallel_size 1"),
        ({"model__lora_rank": 4}, "--lora_rank do not go together"),
        (
            {"model__medusa_freeze_backbone": False, "model__num_medusa_heads": 7},
            "must be at most 6",
        ),
    ],
)
def test_what_cannot_be_is_one_sentence(
    tokens: Path, tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        run(make_config(tokens, tmp_path / "run", **({"model__num_medusa_heads": 2} | changes)))
