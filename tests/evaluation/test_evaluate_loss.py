"""``evaluate.py loss``: the loss of training's own validation, its floors, and how it goes on."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.distributed_run import run_distributed, run_script
from helpers.prepared import make_videos, prepare_small, write_data_set
from helpers.prompts import prepare_prompts, write_lines
from helpers.run_case import make_config
from safetensors.torch import load_file, save_file

from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.config import merge
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.errors import (
    ConfigError,
    DatasetError,
    OutputFolderError,
    PartialFailureError,
    SaveError,
    TokenizerError,
)
from cosmos_posttrain.evaluation import loss, score_file
from cosmos_posttrain.evaluation.config.loss import LossEvalConfig
from cosmos_posttrain.evaluation.tally import Tally
from cosmos_posttrain.training.trainer import train

STEPS = 6
SPLIT = "2,2,1"  # of five videos, with two clips each


def loss_config(data: Path, model: Path | str, output: Path, **changes: Any) -> LossEvalConfig:
    settings = {"data_path": str(data), "ar_model_dir": str(model), "output": str(output)}
    return merge(LossEvalConfig, None, list((settings | {"num_threads": 1} | changes).items()))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips of 3x2x4 tokens from five videos."""
    folder = tmp_path_factory.mktemp("tokens")
    (folder / "videos").mkdir()
    prepare_small(make_videos(folder / "videos"), folder / "tokens", width=32, videos_per_shard=1)
    return folder / "tokens"


@pytest.fixture(scope="module")
def run_dir(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that validates its last step."""
    log_dir = tmp_path_factory.mktemp("run") / "run"
    changes = {"data__split_string": SPLIT, "max_steps": STEPS, "save_every_n_steps": STEPS}
    train(make_config(tokens, log_dir, **changes))
    return log_dir


def validation_loss(log_dir: Path) -> float:
    rows = (log_dir / "default" / "metrics.jsonl").read_text().splitlines()
    return float(json.loads(rows[-1])["val_loss"])


@pytest.fixture(scope="module")
def whole(tokens: Path, run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The validation split, batch 1, one process."""
    output = tmp_path_factory.mktemp("whole") / "loss.json"
    return loss.run(loss_config(tokens, run_dir, output, split="validation"))


def test_loss_is_the_validation_loss_of_the_run(
    tokens: Path, run_dir: Path, whole: dict[str, Any], tmp_path: Path
) -> None:
    assert whole["figures"]["nats_per_token"] == pytest.approx(validation_loss(run_dir), abs=1e-5)
    assert whole["settings"]["split_string"] == SPLIT  # the run's own
    assert whole["figures"]["num_clips"] == 4
    config = loss_config(tokens, run_dir, tmp_path, split="validation", micro_batch_size=4)
    four = loss.run(config)
    assert json.loads((tmp_path / "metrics.json").read_text())["figures"] == four["figures"]
    assert four["figures"]["nats_per_token"] == pytest.approx(validation_loss(run_dir), abs=1e-5)
    assert four["figures"]["baselines"] == whole["figures"]["baselines"]


def run_both(first: LossEvalConfig, second: LossEvalConfig) -> list[dict[str, Any]]:
    """At the top level for ``run_distributed``."""
    return [loss.run(first), loss.run(second)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        "tensor_model_parallel_size",
        pytest.param("pipeline_model_parallel_size", marks=pytest.mark.slow),
        "context_parallel_size",
        "data",
    ],
)
def test_every_layout_gives_the_same_loss(
    tokens: Path, run_dir: Path, whole: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    changes = {} if layout == "data" else {layout: 2}
    configs = [
        loss_config(
            tokens,
            run_dir,
            tmp_path / f"{batch}.json",
            split="validation",
            micro_batch_size=batch,
            **changes,
        )
        for batch in (1, 4)
    ]
    results, others = run_distributed(run_both, 2, *configs, timeout_seconds=300)
    assert others == [{}, {}]
    expected = whole["figures"]
    for result in results:
        ours = result["figures"]
        assert ours["nats_per_token"] == pytest.approx(validation_loss(run_dir), abs=1e-5)
        assert ours["per_latent_frame"] == pytest.approx(expected["per_latent_frame"], abs=1e-5)
        assert ours["num_clips"] == expected["num_clips"]
        assert (
            ours["baselines"]["bigram"]["per_position"]
            == (expected["baselines"]["bigram"]["per_position"])
        )
        losses = [
            {row["clip"]: row["nats_per_token"] for row in rows}
            for rows in (result["rows"], whole["rows"])
        ]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_figures_agree_with_one_another(tokens: Path, whole: dict[str, Any]) -> None:
    figures = whole["figures"]
    nats = figures["nats_per_token"]
    assert figures["bits_per_token"] == pytest.approx(nats / math.log(2))
    assert figures["perplexity"] == pytest.approx(math.exp(nats))
    assert figures["top_500_cross_entropy"] == pytest.approx(nats)  # of 64 tokens
    assert 0 <= figures["top_1"] <= figures["top_5"] <= figures["top_500"] == 1
    low, high = figures["ci95"]["nats_per_token"]
    assert low <= nats <= high
    frames = figures["per_latent_frame"]  # 7, 8 and 8 tokens are foreseen
    assert np.average(frames, weights=[7, 8, 8]) == pytest.approx(nats)
    places = np.array(figures["per_position"])
    assert places.shape == (2, 4)
    weights = np.array([[2, 3, 3, 3], [3, 3, 3, 3]])  # nothing comes before the first token
    assert np.average(places, weights=weights) == pytest.approx(nats)
    assert np.mean([row["nats_per_token"] for row in whole["rows"]]) == pytest.approx(nats)
    losses = [row["nats_per_token"] for row in whole["rows"]]
    assert losses == sorted(losses, reverse=True)
    assert {row["source"] for row in whole["rows"]} == {
        TokenDataset(tokens, "validation", SPLIT).source(number) for number in range(4)
    }


def test_baselines_are_those_of_the_training_split(tokens: Path, whole: dict[str, Any]) -> None:
    found = whole["figures"]["baselines"]
    assert found["uniform"]["nats_per_token"] == pytest.approx(math.log(64))
    counts = np.zeros(64)
    for clip in TokenDataset(tokens, "train", SPLIT):
        counts += np.bincount(clip.numpy(), minlength=64)
    described = whole["figures"]["baseline_settings"]
    assert described["num_training_clips"] == 4
    smoothed = counts + described["fitted"]["unigram"]["smoothing"]
    held_out = torch.stack(list(TokenDataset(tokens, "validation", SPLIT)))[:, 1:].numpy()
    expected = -np.log(smoothed / smoothed.sum())[held_out].mean()
    assert found["unigram"]["nats_per_token"] == pytest.approx(expected, abs=1e-5)
    model = whole["figures"]["nats_per_token"]
    for row in found.values():
        assert row["nats_above_model"] == pytest.approx(row["nats_per_token"] - model)
        low, high = row["nats_above_model_ci95"]
        assert low - 1e-9 <= row["nats_above_model"] <= high + 1e-9
        assert len(row["per_latent_frame"]) == 3 and np.shape(row["per_position"]) == (2, 4)


def test_a_model_without_weights_is_as_perplexed_as_the_vocabulary_is_large(
    tokens: Path, run_dir: Path, tmp_path: Path
) -> None:
    convert(CheckpointConversionConfig(str(run_dir), str(tmp_path / "zero"), "safetensors"))
    for path in (tmp_path / "zero").glob("*.safetensors"):
        save_file({name: torch.zeros_like(t) for name, t in load_file(path).items()}, path)
    metrics = loss.run(loss_config(tokens, tmp_path / "zero", tmp_path / "out.json"))
    assert metrics["figures"]["perplexity"] == pytest.approx(64, rel=1e-6)
    uniform = metrics["figures"]["baselines"]["uniform"]
    for key in ("nats_per_token", "top_1", "top_5", "top_500_cross_entropy"):
        assert metrics["figures"][key] == pytest.approx(uniform[key], rel=1e-6)


def test_video2world_scores_every_token_that_training_does(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    prepare_prompts(write_lines(tmp_path / "videos"), tmp_path / "tokens")
    settings = {
        "model__path": "random:tiny-video2world",
        "data__split_string": SPLIT,
        "max_steps": 2,
        "save_every_n_steps": 2,
        "num_condition_latents": 1,
        "prompt_dropout": 0.3,
    }
    train(make_config(tmp_path / "tokens", tmp_path / "run", **settings), takes_text=True)
    config = loss_config(
        tmp_path / "tokens", tmp_path / "run", tmp_path / "out.json", split="validation"
    )
    figures = loss.run(config)["figures"]
    expected = validation_loss(tmp_path / "run")
    assert figures["nats_per_token"] == pytest.approx(expected, abs=1e-5)
    assert figures["per_latent_frame"][0] is None  # given in the run, and so here
    config = loss_config(
        tmp_path / "tokens", tmp_path / "run", tmp_path / "all.json", num_condition_latents=0
    )
    assert loss.run(config)["figures"]["per_latent_frame"][0] > 0  # <bov> foresees the first
    with pytest.raises(ConfigError, match="the model takes no text, but the data set's clips have"):
        loss.run(loss_config(tmp_path / "tokens", "random:tiny", tmp_path / "no.json"))


class StopHere(Exception):
    """As a kill would."""


@pytest.mark.parametrize("num_adds", [2, 4 + 7])  # amid the model's clips, amid the baselines'
def test_a_killed_evaluation_goes_on(
    tokens: Path,
    run_dir: Path,
    whole: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_adds: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = loss_config(tokens, run_dir, tmp_path / "out.json", split="validation")
    monkeypatch.setattr(score_file, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(score_file, "_MAX_SHARE", 1e9)
    done, add = 0, Tally.add

    def add_some(tally: Tally, *args: Any) -> None:
        nonlocal done
        done += 1
        if done > num_adds:
            raise StopHere
        add(tally, *args)

    monkeypatch.setattr(Tally, "add", add_some)
    with pytest.raises(StopHere):
        loss.run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial.npz"]
    done = -100
    assert loss.run(config)["figures"] == whole["figures"]
    assert done <= -100 + 20 - num_adds + 3  # at most a clip's four baselines twice
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    assert "clips/s" in capfd.readouterr().err


def test_second_runs(tokens: Path, run_dir: Path, whole: dict[str, Any], tmp_path: Path) -> None:
    config = loss_config(tokens, run_dir, tmp_path / "out.json", split="validation")
    first = loss.run(config)
    before = (tmp_path / "out.json").stat().st_mtime_ns
    assert loss.run(config) == first
    assert (tmp_path / "out.json").stat().st_mtime_ns == before
    config.split = "test"
    with pytest.raises(OutputFolderError, match=r"holds another evaluation \(split test here"):
        loss.run(config)
    config.overwrite = True
    assert loss.run(config)["figures"]["num_clips"] == 2
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    config = loss_config(tokens, run_dir, tmp_path / "notes.json")
    with pytest.raises(OutputFolderError, match="holds another evaluation"):
        loss.run(config)
    (tmp_path / "bad.partial.npz").write_bytes(b"torn")
    assert loss.run(loss_config(tokens, run_dir, tmp_path / "bad.json"))["figures"]["num_clips"]


def test_what_does_not_go_together_is_refused(tokens: Path, run_dir: Path, tmp_path: Path) -> None:
    def refused(data: Path, model: Path | str, error: type[Exception], match: str, **more: Any):
        with pytest.raises(error, match=match):
            loss.run(loss_config(data, model, tmp_path / "out" / "x.json", **more))
        assert not (tmp_path / "out").exists()

    other = write_data_set(tmp_path / "other", 3)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["contract"]["tokenizer"]["sha256"] = "f" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    refused(other, run_dir, TokenizerError, "was trained on tokens of block-mean .* or try anyway")
    refused(tokens, run_dir, ConfigError, "needs a multiple of 2", tensor_model_parallel_size=2)
    refused(tokens, run_dir, DatasetError, "the test split .* holds no clip", split_string="4,1,0")
    refused(tokens, run_dir, ConfigError, "leaves nothing to predict", num_condition_latents=3)
    refused(tokens, run_dir, ConfigError, "--split all is not one of train, valid", split="all")
    config = loss_config(other, run_dir, tmp_path / "y.json", allow_tokenizer_mismatch=True)
    notes = loss.run(config)["notes"]
    assert any("trained on another data set" in note for note in notes)


def test_an_unreadable_clip_is_named_and_the_rest_is_scored(
    tokens: Path, run_dir: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(tokens, tmp_path / "tokens")
    held_out = TokenDataset(data, "validation", SPLIT)
    victim = held_out.source(0)
    shard = next(
        path for path in sorted(data.glob("*.jsonl")) if f'"{victim}"' in path.read_text()
    ).with_suffix(".bin")
    del held_out
    damaged = bytearray(shard.read_bytes())
    damaged[0] ^= 1
    shard.write_bytes(damaged)
    config = loss_config(data, run_dir, tmp_path / "out.json", split="validation")
    with pytest.raises(PartialFailureError, match=f"max_failures is 0.*{shard.name} is damaged"):
        loss.run(config)
    metrics = json.loads((tmp_path / "out.json").read_text())
    found = metrics["figures"]
    assert found["num_clips"] + found["num_failures"] == 4 and 0 < found["num_clips"] < 4
    assert len(metrics["failures"]) == found["num_failures"]
    assert found["nats_per_token"] > 0 and metrics["failures"][0]["clip"] == 0


@pytest.mark.slow
def test_the_script_prints_a_table(tokens: Path, run_dir: Path, tmp_path: Path) -> None:
    command = ["evaluate.py", "loss", "--data_path", str(tokens), "--ar_model_dir", str(run_dir)]
    done = run_script([*command, "--output", str(tmp_path / "loss")], timeout_seconds=120)
    assert done.returncode == 0, done.stderr
    for name in ("model", "uniform", "unigram", "previous_frame", "bigram"):
        assert f"\n{name}  " in done.stdout
    done = run_script(command[:2], timeout_seconds=60)
    assert done.returncode == 2 and "--data_path is missing" in done.stderr


def test_a_full_disk_is_said(
    tokens: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "savez", no_room)
    with pytest.raises(SaveError, match=r"could not be written .*No space left.* goes on"):
        loss.run(loss_config(tokens, run_dir, tmp_path / "out.json"))
