"""What a run can be watched by: rows, TensorBoard, W&B, sample clips, a profile."""

from __future__ import annotations

import dataclasses
import gc
import io
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.prepared import config as prepare_config
from helpers.prepared import make_videos
from helpers.run_case import losses, make_config, run
from helpers.wandb_file import read_launches

from cosmos_posttrain import runlog
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.errors import ConfigError, DatasetError, TokenizerError
from cosmos_posttrain.evaluation.report.curves import read_curves
from cosmos_posttrain.inference.engine import generate
from cosmos_posttrain.prepare.prepare import prepare
from cosmos_posttrain.tokenizer import load_tokenizer
from cosmos_posttrain.training import metrics, sample_clips
from cosmos_posttrain.training.callbacks.samples import Samples
from cosmos_posttrain.training.config import TrainConfig, validate
from cosmos_posttrain.training.optimizer import parts_of
from cosmos_posttrain.training.sample_clips import SampleMaker, num_given_latents
from cosmos_posttrain.training.trainer import Trainer
from cosmos_posttrain.training.watching_config import parse_profile_steps
from cosmos_posttrain.video import probe

SHIPPED = Path(load_tokenizer.__code__.co_filename).parent / "weights" / "tiny-dv4x8x8"
# Every number that docs/training.md names, but for mfu, which needs a GPU whose peak is known.
EACH_STEP = {
    *("reduced_train_loss", "lr", "grad_norm", "grad_norm_embedding", "consumed_samples"),
    *("consumed_tokens", "epoch", "train_step_timing in s", "tokens_per_second"),
    *("tokens_per_second_per_gpu", "clips_per_second_per_gpu", "TFLOPS_per_GPU"),
    *("data_wait_seconds", "peak_memory_gib"),
}
SOMETIMES = {
    *("param_norm", "step_time_jitter", "save_wait_seconds", "val_loss", "val_bits_per_token"),
    *("val_top_1", "val_loss_latent_0", "val_loss_latent_1", "val_loss_latent_2"),
}
FILMS = {"samples/clip=0", "samples/clip=1"}
STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``videos``, and ``tokens`` that a shipped tokenizer made of them: grids of 3x2x3."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "videos").mkdir()
    make_videos(folder / "videos")
    prepare(
        prepare_config(folder / "videos", folder / "tokens"), load_tokenizer("tiny-dv4x8x8", "cpu")
    )
    return folder


def settings(folder: Path, log_dir: Path, **changes: Any) -> TrainConfig:
    return make_config(
        folder / "tokens", log_dir, **{"max_steps": STEPS, "save_every_n_steps": 4} | changes
    )


def sampling(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "samples__every_n_steps": 3,
        "samples__videos_dir": str(folder / "videos"),
        **changes,
    }


def cut(log_dir: Path, steps: int) -> None:
    """As if the run had been killed after its first checkpoint and some further steps."""
    path = log_dir / "default" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:steps]))
    (last,) = (log_dir / "default" / "checkpoints").glob(f"*step={STEPS - 1}")
    shutil.rmtree(last)


@pytest.fixture(scope="module")
def watched(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two launches that is watched by everything."""
    log_dir = tmp_path_factory.mktemp("runs") / "watched"
    pytest.importorskip("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        run(settings(folder, log_dir, **sampling(folder)))
        cut(log_dir, 6)
        run(settings(folder, log_dir, **sampling(folder)))
    return log_dir


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run without samples and W&B, resumed with a row as they once were."""
    log_dir = tmp_path_factory.mktemp("runs") / "plain"
    run(settings(folder, log_dir))
    cut(log_dir, 6)
    path = log_dir / "default" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    old = ("step", "reduced_train_loss", "lr", "grad_norm", "consumed_samples", "val_loss")
    cut_rows = [{key: row[key] for key in old if key in row} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in cut_rows))
    run(settings(folder, log_dir))
    return log_dir


def rows_of(log_dir: Path) -> list[dict[str, Any]]:
    return runlog.read_rows(log_dir / "default" / "metrics.jsonl")


def test_every_number_is_in_the_rows_and_finite(watched: Path) -> None:
    rows = rows_of(watched)
    assert [row["step"] for row in rows] == list(range(STEPS))
    for row in rows:
        assert set(row) >= EACH_STEP
        assert all(math.isfinite(row[key]) for key in EACH_STEP | SOMETIMES if key in row)
    assert set().union(*rows) >= SOMETIMES
    last = rows[-1]
    assert last["consumed_tokens"] == 18 * last["consumed_samples"] == 18 * 4 * STEPS
    assert last["val_bits_per_token"] == pytest.approx(last["val_loss"] / math.log(2))
    seconds = last["train_step_timing in s"] + last["data_wait_seconds"]
    assert last["tokens_per_second"] == pytest.approx(18 * 4 / seconds)
    assert last["clips_per_second_per_gpu"] == pytest.approx(4 / seconds)
    assert 0.01 < last["peak_memory_gib"] < 64 and last["mfu"] is None


def test_tensorboard_has_all_of_it(watched: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(
        str(watched / "default" / "tb_logs"), size_guidance={"scalars": 0, "images": 0}
    ).Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) >= EACH_STEP | SOMETIMES
    rows = rows_of(watched)
    for tag in EACH_STEP | SOMETIMES:
        found = {event.step: event.value for event in events.Scalars(tag)}
        assert all(map(math.isfinite, found.values()))
        wanted = {row["step"]: row[tag] for row in rows if tag in row}
        assert found == pytest.approx(wanted, rel=1e-6)
    assert set(tags["images"]) == FILMS
    for tag in FILMS:
        images = {event.step: event for event in events.Images(tag)}
        assert set(images) == {2, 5, STEPS - 1}
        with Image.open(io.BytesIO(images[2].encoded_image_string)) as film:
            assert film.format == "GIF" and film.n_frames > 1
            assert film.size == (images[2].width, images[2].height)


def test_both_launches_are_one_run_in_wandb(watched: Path) -> None:
    launches = read_launches(watched / "default")
    assert len(launches) == 2
    known = (watched / "default" / "wandb_id.txt").read_text().strip()
    assert {launch.run_id for launch in launches} == {known}
    first, second = (
        {row["_step"]: row for row in launch.history if "reduced_train_loss" in row}
        for launch in launches
    )
    assert list(first) == list(range(STEPS)) and list(second) == list(range(4, STEPS))
    history = first | second
    for row in rows_of(watched):
        for key in EACH_STEP | SOMETIMES:
            if key in row:
                assert history[row["step"]][key] == pytest.approx(row[key])
    for launch, step in zip(launches, (2, 5), strict=True):
        row = next(row for row in launch.history if row["_step"] == step)
        for name in FILMS:
            assert row[f"{name}/_type"] == "video-file"
            film = launch.folder / "files" / row[f"{name}/path"]
            assert probe(film).num_frames == 9


def test_films_show_four_panels_of_the_clip(watched: Path) -> None:
    films = sorted((watched / "default" / "samples").glob("*/*.mp4"))
    names = [f"step={step}/clip={clip}" for step in (2, 5, STEPS - 1) for clip in (0, 1)]
    assert [f"{film.parent.name}/{film.stem}" for film in films] == names
    info = probe(films[0])
    assert info.width == 4 * 24 and info.height > 16 and info.num_frames == 9
    assert info.fps == 10  # as the source videos


def test_samples_change_nothing_and_old_rows_are_read(watched: Path, plain: Path) -> None:
    assert losses(watched) == losses(plain)
    for name in ("grad_norm", "param_norm", "val_loss", "val_top_1"):
        assert rows_of(watched)[-1].get(name) == rows_of(plain)[-1].get(name)
    assert not (plain / "default" / "samples").exists()
    curves = read_curves(plain / "default" / "metrics.jsonl")
    assert len(curves.of["val_loss"]) == 2 and len(curves.of["tokens_per_second"]) == 4
    weights = [load_model(str(path), "cpu").module.state_dict() for path in (watched, plain)]
    assert all(
        torch.equal(value, weights[1][name])
        for name, value in weights[0].items()
        if isinstance(value, torch.Tensor)
    )


# Samples.


@pytest.fixture
def sampler(folder: Path, tmp_path: Path) -> Iterator[tuple[Trainer, SampleMaker]]:
    """A run under way, with LoRA's factors on top, which plain decoding would not see."""
    changes = {"model__lora_rank": 4, "optimizer__lr": 0.02, "max_steps": 3}
    trainer = Trainer(settings(folder, tmp_path / "run", **changes, samples__every_n_steps=100))
    (samples,) = (item for item in trainer.callbacks if isinstance(item, Samples))
    yield trainer, samples._maker
    trainer.close()


def alive() -> int:
    """Numbers in all tensors that anybody holds."""
    gc.collect()
    # By type: to ask an object for its class is more than some of torch's take.
    return sum(x.numel() for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


def test_what_is_generated_is_the_runs_own_model(
    sampler: tuple[Trainer, SampleMaker], folder: Path
) -> None:
    """The merged checkpoint generates the same; nothing is kept, and training goes on."""
    trainer, maker = sampler
    checkpoint = trainer.fit()
    clips = maker.make()
    random = torch.get_rng_state()
    before = alive()
    again = maker.make()
    assert all(torch.equal(a.generated, b.generated) for a, b in zip(clips, again, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.ddp.training
    numbers = sum(3 * clip.truth.numel() for clip in clips)
    assert alive() - before <= 2 * numbers
    assert math.isfinite(trainer.train_step(next(trainer.batches()))["reduced_train_loss"])
    model = load_model(str(checkpoint), "cpu")
    data = TokenDataset(folder / "tokens", "validation", "3,1,1")
    assert [clip.number for clip in clips] == [0, 1]
    for clip in clips:
        truth = data[clip.number]
        assert torch.equal(clip.truth.flatten(), truth)
        made = generate(model, truth[None, :6], 12, top_p=0.8, items=[clip.number])
        assert torch.equal(clip.generated.flatten(), torch.cat([truth[:6], made[0]]))
        best = model.logits(truth[None])[0].argmax(-1)
        assert torch.equal(clip.preview.flatten(), torch.cat([truth[:6], best[5:-1]]))


def test_a_film_that_cannot_be_made_does_not_end_the_run(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(SHIPPED, tokenizer)
    changes = {"samples__every_n_steps": 2, "samples__tokenizer_path": str(tokenizer)}
    trainer = Trainer(settings(folder, tmp_path / "run", max_steps=2, **changes))
    shutil.rmtree(tokenizer)
    trainer.fit()
    trainer.close()
    assert "warning: no samples of step 1: " in capsys.readouterr().err
    assert len(losses(tmp_path / "run")) == 2


def test_clips_that_cannot_be_generated_do_not_end_the_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As where a GPU has no room; the loop tells where it is before each clip."""

    def no_room(*_args: Any, **_kwargs: Any) -> Any:
        raise RuntimeError("out of memory (made up)")

    monkeypatch.setattr(sample_clips, "generate", no_room)
    changes = {"samples__every_n_steps": 2, "samples__num_clips": 2}
    trainer = Trainer(settings(folder, tmp_path / "run", max_steps=2, **changes))
    told: list[str] = []
    monkeypatch.setattr(Trainer, "tell", lambda _, place: told.append(place))
    try:
        trainer.fit()
    finally:
        trainer.close()
    assert told[0] == "sample 1 of 2"
    assert "no samples of step 1: out of memory" in capsys.readouterr().err
    assert len(losses(tmp_path / "run")) == 2


def test_samples_that_cannot_be_made_are_refused_before_anything_is_written(
    tokens: Path, folder: Path, tmp_path: Path
) -> None:
    """``tokens`` were made by a tokenizer that is nowhere."""
    config = make_config(tokens, tmp_path / "run", samples__every_n_steps=2)
    with pytest.raises(TokenizerError, match=r"block-mean.*--sample_tokenizer_path"):
        run(config)
    config.samples.tokenizer_path = str(SHIPPED)
    with pytest.raises(TokenizerError, match="sha256"):
        run(config)
    config = settings(folder, tmp_path / "run", **sampling(folder))
    config.samples.videos_dir = str(tmp_path)
    with pytest.raises(ConfigError, match=r"--sample_videos_dir .* has no \d.mp4"):
        run(config)
    config = settings(folder, tmp_path / "run", **sampling(folder))
    prefix = next((folder / "tokens").glob("*.bin")).with_suffix("")
    bare = dataclasses.replace(config.data, path=str(prefix), latent_shape="3,2,3", vocab_size=4096)
    config = dataclasses.replace(config, data=bare)
    with pytest.raises(DatasetError, match="no manifest"):
        run(config)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="leaves no frame to generate"):
        num_given_latents(0, num_latents=1)


def test_settings_that_mean_nothing_are_refused_together() -> None:
    config = TrainConfig()
    config.data.path = "x"
    config.samples.tokenizer_path = "tiny"
    config.profile_steps = "98-100"
    with pytest.raises(ConfigError) as error:
        validate(config, world_size=2)
    assert "--sample_tokenizer_path has no effect without" in str(error.value)
    assert "--profile_steps 98-100 must end before --max_steps 100" in str(error.value)
    config.samples.every_n_steps, config.profile_steps = 0, None
    config.samples.num_clips = 17
    config.parallel.pipeline_model_parallel_size = 2
    config.parallel.context_parallel_size = 2
    with pytest.raises(ConfigError) as error:
        validate(config, world_size=8)
    for part in (
        "--sample_every_n_steps 0 must be at least 1",
        "--num_sample_clips 17 must be at most 16",
        "--pipeline_model_parallel_size 2 cannot",
        "--context_parallel_size 2 cannot",
    ):
        assert part in str(error.value)


# Waiting, and the profile.


def test_waiting_for_data_is_told_and_counts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            time.sleep(0.3)
            yield batch

    trainer = Trainer(settings(folder, tmp_path / "run", max_steps=3))
    batches = trainer.batches
    monkeypatch.setattr(trainer, "batches", lambda: slowly(batches()))
    trainer.fit()
    trainer.close()
    for row in rows_of(tmp_path / "run"):
        assert 0.3 <= row["data_wait_seconds"] < 2
        assert row["tokens_per_second"] < 18 * 4 / 0.3


def test_speed_counts_what_this_rank_waited_and_no_other(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waiting for a rank whose data came late is in the step's own time."""
    slowest = metrics._largest
    monkeypatch.setattr(
        metrics, "_largest", lambda device, waited, *more: slowest(device, waited + 100, *more)
    )
    trainer = Trainer(settings(folder, tmp_path / "run", max_steps=2))
    row = trainer.train_step(next(trainer.batches()))
    # Of gradients in bfloat16 the float32 copies would stay through saving and validation.
    (part,) = parts_of(trainer.optimizer.optimizer)
    assert all(parameter.grad is None for parameter in part.get_parameters())
    trainer.close()
    assert row["data_wait_seconds"] >= 100
    assert row["tokens_per_second"] > 18 * 4 / 50


def test_a_profile_that_cannot_be_written_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The profiler writes beside the file that it is told, and does not say that it failed."""

    def fail(_self: Any, path: str) -> None:
        Path(f"{path}.tmp").write_bytes(b"half of it")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", fail)
    run(settings(folder, tmp_path / "run", max_steps=3, profile_steps="1-1"))
    assert "no profile was written" in capsys.readouterr().err
    assert list((tmp_path / "run" / "default" / "profile").iterdir()) == []


def test_a_profile_has_the_steps_that_were_asked_for(folder: Path, tmp_path: Path) -> None:
    changes = {"max_steps": 4, "profile_steps": "1-2"}
    run(settings(folder, tmp_path / "run", **changes, limit_val_batches=0))
    (trace,) = (tmp_path / "run" / "default" / "profile").iterdir()
    assert trace.name == "steps=1-2.rank=0.pt.trace.json"
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum(name == "Optimizer.step#AdamW.step" for name in names) == 2


def test_steps_behind_a_run_are_not_profiled(
    plain: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(plain, tmp_path / "run")
    run(settings(folder, tmp_path / "run", max_steps=9, profile_steps="6-7"))
    assert "note: step 6 is behind this run: nothing is profiled." in capsys.readouterr().out
    assert not (tmp_path / "run" / "default" / "profile").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("12-10", "ends before it begins"),
        ("-3", "must be two steps"),
        ("a-b", "must be two steps"),
        ("0-99", "are 100 steps"),
    ],
)
def test_ranges_that_are_none(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_profile_steps(text)


def test_ranges_of_steps() -> None:
    assert list(parse_profile_steps("10-12")) == [10, 11, 12]
    assert list(parse_profile_steps("10")) == [10]
