"""``evaluate.py generate``: floors and ceiling, the small world, seeds, failures, continuations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.errors import PartialFailureError, UserError
from cosmos_posttrain.evaluation.config.generate import GenerateEvalConfig
from cosmos_posttrain.evaluation.generation import command, inputs
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.prepare.config import PrepareConfig
from cosmos_posttrain.prepare.prepare import prepare
from cosmos_posttrain.tokenizer import load_tokenizer
from cosmos_posttrain.toy_world.config import ToyWorldConfig
from cosmos_posttrain.toy_world.write import write_world
from cosmos_posttrain.video import probe, read_clips, to_uint8

TOKENIZER = "tiny-dv8x16x16"
FRAMES, HEIGHT, WIDTH, GIVEN = 17, 64, 96, 9
FLOORS = {"repeat_last_frame", "constant_motion"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six videos of a ball that flies, and their tokens (3, 4, 6)."""
    folder = tmp_path_factory.mktemp("world")
    sizes = {"height": HEIGHT, "width": WIDTH, "diameter": "20", "speed": "1,1.5"}
    write_world(ToyWorldConfig(output=str(folder / "world"), num_videos=6, **sizes))
    config = PrepareConfig(
        input_videos_dir=str(folder / "world" / "videos"),
        output_prefix=str(folder / "tokens"),
        width=WIDTH,
        height=HEIGHT,
        num_context_frames=FRAMES,
        tokenizer_compression_factor="8,16,16",
    )
    prepare(config, load_tokenizer(TOKENIZER, device="cpu"))
    return folder


def config_of(world: Path, output: Path, **changes: Any) -> GenerateEvalConfig:
    values: dict[str, Any] = {
        "data_path": str(world / "tokens"),
        "ar_model_dir": "random:tiny",
        "videos": str(world / "world" / "videos"),
        "output_dir": str(output),
        "split_string": "2,2,2",
        "num_threads": 1,
    }
    return GenerateEvalConfig(**(values | changes))


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Two clips, two samples each."""
    output = tmp_path_factory.mktemp("whole") / "out"
    return output, command.run(config_of(world, output, num_samples=2, sampson=True))


def test_scores_lie_between_floors_and_the_ceiling(whole: tuple[Path, dict[str, Any]]) -> None:
    output, metrics = whole
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert sorted(path.name for path in output.iterdir()) == ["clips", "metrics.json"]
    figures = metrics["figures"]
    psnr = {what: figures[what]["psnr"] for what in (*FLOORS, "generated", "reconstruction")}
    # A model of random weights is worse than any guess, the tokenizer better than all.
    assert psnr["reconstruction"] > max(psnr[floor] for floor in FLOORS)
    assert psnr["generated"] < min(psnr[floor] for floor in FLOORS)
    for what in psnr:
        series = figures[what]["by_frame"]
        assert set(series) == {"psnr", "ssim", "position_error"}
        assert [len(values) for values in series.values()] == [FRAMES] * 3
        assert figures[what]["psnr"] == pytest.approx(sum(series["psnr"][GIVEN:]) / 8)
        # All begin with the given frames, as the tokenizer gives them back.
        ceiling = figures["reconstruction"]["by_frame"]["psnr"]
        assert series["psnr"][:GIVEN] == pytest.approx(ceiling[:GIVEN], abs=0.01)
    # The ball moves on: where it was is ever further from where it is.
    repeated = figures["repeat_last_frame"]["by_frame"]["position_error"]
    assert repeated[-1] > repeated[GIVEN] + 3
    assert figures["reconstruction"]["position_error"] < 2
    assert figures["diversity"] > 1
    assert figures["num_clips"] == 2
    assert metrics["settings"]["truth"] == "source video"
    assert metrics["settings"]["num_input_frames"] == GIVEN


def test_clips_are_written_for_the_report(world: Path, whole: tuple[Path, dict[str, Any]]) -> None:
    output, metrics = whole
    names = [row["name"] for row in metrics["rows"]]
    assert sorted(path.name for path in (output / "clips").iterdir()) == sorted(names)
    films = {"truth", "reconstruction", "generated_seed0", "generated_seed1"}
    for row in metrics["rows"]:
        folder = output / "clips" / row["name"]
        assert {path.stem for path in folder.iterdir()} == films
        assert {probe(path).num_frames for path in folder.iterdir()} == {FRAMES}
        truth = read_clips(world / "world" / "videos" / row["video"], [0], FRAMES, HEIGHT, WIDTH)
        shown = read_clips(folder / "truth.mp4", [0], FRAMES, HEIGHT, WIDTH)
        difference = truth[0].frames.float() - shown[0].frames.float()
        assert difference.abs().mean() < 3  # the mp4's own loss


def test_failures_are_counted_by_sample(whole: tuple[Path, dict[str, Any]]) -> None:
    figures, rows = whole[1]["figures"], whole[1]["rows"]
    failed = {(row["name"], defect["sample"]) for row in rows for defect in row["defects"]}
    assert figures["failure_rate"] == len(failed) / 4
    low, high = figures["failure_rate_interval"]
    assert 0 <= low <= figures["failure_rate"] <= high <= 1
    assert figures["truth_flagged_rate"] == 0


class Collapsed(Session):
    """A session whose second sample of each clip ends in one colour."""

    def generate_many(self, requests: Any, progress: Any = None, on_tokens: Any = None) -> Any:
        results = super().generate_many(requests, progress, on_tokens)
        for request, result in zip(requests, results, strict=True):
            if request.sample == 1:
                result.frames[:, GIVEN + 1 :] = 90
        return results


def test_failures_are_named_with_their_sample(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "Session", Collapsed)
    metrics = command.run(config_of(world, tmp_path / "out", num_samples=2, batch_size=3))
    figures = metrics["figures"]
    assert figures["failure_rate"] >= 0.5
    assert figures["failures_by_kind"]["solid_color"] == 2
    for row in metrics["rows"]:
        solid = [d for d in row["defects"] if d["kind"] == "solid_color"]
        assert [defect["sample"] for defect in solid] == [1]
        assert solid[0]["frame"] >= GIVEN


class Perfect(Session):
    """A session whose model foresees all: what it is asked for is looked up."""

    clips: TokenDataset

    def generate_many(self, requests: Any, progress: Any = None, on_tokens: Any = None) -> Any:
        results = super().generate_many(requests, progress, on_tokens)
        for request, result in zip(requests, results, strict=True):
            result.tokens = self.clips[request.item].view(result.tokens.shape)
        return results


def test_a_perfect_model_reaches_the_ceiling(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Perfect.clips = TokenDataset(world / "tokens", "test", "2,2,2")
    monkeypatch.setattr(inputs, "Session", Perfect)
    figures = command.run(config_of(world, tmp_path / "out"))["figures"]
    for name in ("psnr", "ssim", "position_error"):
        assert figures["generated"][name] == figures["reconstruction"][name]
    assert figures["failure_rate"] == 0
    assert figures["generated"]["psnr"] > figures["constant_motion"]["psnr"]


def test_without_source_videos_the_reconstruction_is_the_truth(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = config_of(world, tmp_path / "out", videos=None, num_input_frames=1, max_clips=1)
    metrics = command.run(config)
    said = capsys.readouterr()
    assert "scored against the reconstruction of the stored tokens" in said.out
    assert "--videos" in said.err and "needs two given frames" in said.err
    figures = metrics["figures"]
    assert "reconstruction" not in figures
    assert "constant_motion" not in figures
    assert set(figures["generated"]["by_frame"]) == {"psnr", "ssim"}
    assert figures["generated"]["by_frame"]["psnr"][0] == 100  # the given frame
    (row,) = metrics["rows"]
    films = {path.stem for path in (tmp_path / "out" / "clips" / row["name"]).iterdir()}
    assert films == {"truth", "generated"}
    clips = TokenDataset(world / "tokens", "test", "2,2,2")
    tokens = clips[row["clip"]].view(1, *clips.latent_shape)
    rebuilt = to_uint8(load_tokenizer(TOKENIZER, device="cpu").decode(tokens))[0]
    path = tmp_path / "out" / "clips" / row["name"] / "truth.mp4"
    shown = read_clips(path, [0], FRAMES, HEIGHT, WIDTH)[0].frames
    assert (shown.float() - rebuilt.float()).abs().mean() < 3


def test_a_killed_run_generates_no_clip_twice_and_samples_do_not_depend_on_it(
    world: Path,
    tmp_path: Path,
    whole: tuple[Path, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    config = config_of(world, tmp_path / "out", num_samples=2, sampson=True)
    score, scored = command.score, []

    def stop_at_the_second(*arguments: Any) -> Any:
        scored.append(arguments)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return score(*arguments)

    monkeypatch.setattr(command, "score", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        command.run(config)
    with pytest.raises(UserError, match=r"holds another .*\(seed 1 here, 0 there\)"):
        command.run(config_of(world, tmp_path / "out", num_samples=2, sampson=True, seed=1))
    metrics = command.run(config)
    assert len(scored) == 3
    assert "1 clips are done" in capsys.readouterr().out

    def figures_of(metrics: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in metrics["figures"].items() if k != "tokens_per_second"}

    assert figures_of(metrics) == figures_of(whole[1])
    assert command.run(config) == metrics


def test_an_unreadable_source_video_is_named_after_the_rest(world: Path, tmp_path: Path) -> None:
    videos = tmp_path / "videos"
    shutil.copytree(world / "world" / "videos", videos)
    clips = TokenDataset(world / "tokens", "test", "2,2,2")
    (videos / clips.source(0)).write_bytes(b"\0" * 64)
    with pytest.raises(PartialFailureError, match="1 of 2 clips could not be read") as caught:
        command.run(config_of(world, tmp_path / "out", videos=str(videos)))
    assert caught.value.exit_code == 1
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert clips.source(0) in metrics["failures"][0]["error"]
    assert [row["video"] for row in metrics["rows"]] == [clips.source(1)]
    # No truth of a small world lies beside these.
    assert "position_error" not in metrics["figures"]["generated"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_path": ""}, "--data_path is missing"),
        ({"ar_model_dir": ""}, "--ar_model_dir is missing"),
        ({"ar_model_dir": "nowhere/run"}, "nowhere/run"),
        ({"videos": "nowhere"}, "--videos nowhere is not a folder"),
        ({"num_input_frames": 17}, "leave nothing to generate"),
        ({"num_input_frames": 4}, "4 input frames"),
        ({"num_samples": 2, "temperature": 0.0}, "would all be the same"),
        ({"split_string": "1,0,0"}, "holds no clip"),
        ({"lpips_weights": "nowhere"}, r"nowhere holds no alexnet"),
        ({"ar_model_dir": "random:tiny-video2world"}, "takes a text"),
    ],
)
def test_bad_usage_is_one_sentence_and_nothing_is_written(
    world: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        command.run(config_of(world, tmp_path / "out", **changes))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
