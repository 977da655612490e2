"""The folder of a small world: its layout, killed and repeated runs, and what is refused."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.reference import REFERENCE_DIR
from helpers.small_world import clips

from cosmos_posttrain import files
from cosmos_posttrain.errors import ConfigError, DatasetError, OutputFolderError
from cosmos_posttrain.evaluation.world_truth import WorldTruth, truth_path
from cosmos_posttrain.prepare.sources import from_jsonl
from cosmos_posttrain.toy_world.config import ToyWorldConfig, validate
from cosmos_posttrain.toy_world.write import write_world
from cosmos_posttrain.video import probe, read_clips

SMALL: dict[str, Any] = {"width": 64, "height": 48, "diameter": "16", "num_frames": 5}
BRIDGE_DIR = REFERENCE_DIR / "data" / "bridge"


def write(folder: Path, **values: Any) -> None:
    write_world(ToyWorldConfig(output=str(folder), **{"num_videos": 10, **SMALL, **values}))


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def command(folder: Path, *more: str) -> list[str]:
    flags = [f"--{key}={value}" for key, value in SMALL.items()]
    return [sys.executable, "-m", "cosmos_posttrain.toy_world", f"--output={folder}", *flags, *more]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten clips, eight of them for training."""
    folder = tmp_path_factory.mktemp("small") / "world"
    write(folder)
    return folder


def test_the_layout_is_that_of_the_robot_data(world: Path) -> None:
    assert sorted(path.name for path in world.iterdir()) == [
        "annotation", "prompts.jsonl", "prompts_test.jsonl", "prompts_train.jsonl",
        "prompts_val.jsonl", "truth", "videos", "world.json",
    ]  # fmt: skip
    notes = sorted((world / "annotation").glob("*/*.json"))
    assert [note.parent.name for note in notes] == ["test"] + ["train"] * 8 + ["val"]
    for note in notes:
        value = json.loads(note.read_text())
        assert value["episode_id"] == note.stem
        video = world / value["videos"][0]["video_path"]
        assert video == world / "videos" / note.parent.name / note.stem / "rgb.mp4"
        info = probe(video)
        assert (info.num_frames, info.height, info.width, info.fps) == (5, 48, 64, 10)
        assert np.array(value["action"]).shape == (4, 7)
        assert np.array(value["state"]).shape == (5, 7)
        assert len(value["continuous_gripper_state"]) == 5


@pytest.mark.skipif(not BRIDGE_DIR.is_dir(), reason=f"no robot data at {BRIDGE_DIR}")
def test_annotations_have_the_keys_and_types_of_the_robot_data(world: Path) -> None:
    theirs = json.loads(next((BRIDGE_DIR / "annotation" / "train").glob("*.json")).read_text())
    ours = json.loads((world / "annotation" / "train" / "000000.json").read_text())
    assert set(theirs) - set(ours) == {"latent_videos"}
    assert {key: type(value) for key, value in ours.items()} == {
        key: type(theirs[key]) for key in ours
    }
    assert len(ours["action"][0]) == len(theirs["action"][0])
    assert len(ours["state"][0]) == len(theirs["state"][0])
    assert ours["videos"][0].keys() == theirs["videos"][0].keys()


def test_prompts_are_read_by_preparation(world: Path) -> None:
    sources = from_jsonl(world / "prompts.jsonl")
    assert len(sources) == len({source.name for source in sources}) == 10
    assert all(source.path.is_file() for source in sources)
    by_split = [from_jsonl(world / f"prompts_{split}.jsonl") for split in ("train", "val", "test")]
    assert [source for own in by_split for source in own] == sources
    for source in sources:
        assert source.prompt == WorldTruth.load(truth_path(source.path)).caption


def test_the_truth_comes_back_as_it_was_rendered(tmp_path: Path) -> None:
    write(tmp_path / "a", level="rich", num_videos=1, seed=0)
    truth = WorldTruth.load(truth_path(tmp_path / "a" / "videos" / "train" / "000000" / "rgb.mp4"))
    made = clips(1, level="rich", **SMALL)[0].truth
    assert truth.objects == made.objects
    assert (truth.caption, truth.fps, truth.height, truth.width) == (made.caption, 10, 48, 64)
    for name in ("positions", "velocities", "visible", "camera"):
        assert np.abs(getattr(truth, name) - getattr(made, name)).max() <= 5e-5


def test_the_video_is_the_rendered_clip(world: Path) -> None:
    video = world / "videos" / "train" / "000003" / "rgb.mp4"
    read = read_clips(video, [0], 5, 48, 64)[0].frames.permute(1, 2, 3, 0).numpy()
    made = clips(4, **SMALL)[3].frames
    # The codec halves the resolution of colours; its loss is far below the objects' contrast.
    assert np.abs(read.astype(float) - made).mean() < 3


@pytest.mark.parametrize("damage", ["{", "{}", '{"positions": 3}'])
def test_damaged_truth_is_named(damage: str, world: Path, tmp_path: Path) -> None:
    path = tmp_path / "000000.json"
    path.write_text(damage)
    with pytest.raises(DatasetError, match=re.escape(str(path))):
        WorldTruth.load(path)


def test_truth_with_a_frame_missing_is_damaged(world: Path, tmp_path: Path) -> None:
    value = json.loads((world / "truth" / "train" / "000000.json").read_text())
    value["visible"].pop()
    path = tmp_path / "000000.json"
    path.write_text(json.dumps(value))
    with pytest.raises(DatasetError, match=r"damaged.*visible"):
        WorldTruth.load(path)


def test_the_same_seed_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    write(tmp_path / "again", num_workers=5)
    assert contents(tmp_path / "again") == contents(world)
    write(tmp_path / "other", seed=1)
    other = contents(tmp_path / "other")
    assert not [name for name, data in contents(world).items() if other[name] == data]


def test_splits_hold_different_clips(world: Path) -> None:
    videos = [data for name, data in contents(world).items() if name.endswith("rgb.mp4")]
    assert len(set(videos)) == 10


def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(command(folder, "--num_videos=80"), stderr=subprocess.DEVNULL)
    while not list(folder.glob("annotation/train/0*.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in folder.glob("annotation/*/0*.json")}
    assert 0 < len(done) < 80
    assert not (folder / "world.json").exists()
    # What a killed writer may leave behind.
    (folder / "videos" / "train" / "000060").mkdir(exist_ok=True)
    for name in ("videos/train/000060/.tmp-1-rgb.mp4", "truth/train/.tmp-1-000060.json"):
        (folder / name).write_bytes(b"half")
    write(folder, num_videos=80)
    write(whole, num_videos=80)
    assert contents(folder) == contents(whole)
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


def test_a_lost_file_is_rendered_again(world: Path, tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / "videos" / "val" / "000000" / "rgb.mp4").unlink()
    (tmp_path / "a" / "world.json").rename(tmp_path / "a" / "plan.json")
    write(tmp_path / "a")
    assert contents(tmp_path / "a") == contents(world)


def test_a_complete_world_is_left_alone(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    write(world)
    assert "complete already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def test_clips_can_be_added(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    write(folder, num_videos=4, num_val=0, num_test=0)
    first = {path: path.stat().st_mtime_ns for path in folder.glob("videos/*/*/rgb.mp4")}
    write(folder)
    assert contents(folder) == contents(world)
    assert all(path.stat().st_mtime_ns == when for path, when in first.items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 5}, "seed 5 here, 0 there"),
        ({"speed": "2"}, "speed"),
        ({"level": "bouncing"}, "num_objects 2 here, 1 there"),
        ({"num_videos": 9, "num_val": 1, "num_test": 1}, "7 clips for train here, 8 there"),
    ],
)
def test_another_world_is_refused(change: dict[str, Any], named: str, world: Path) -> None:
    before = contents(world)
    with pytest.raises(OutputFolderError, match=named):
        write(world, **change)
    assert contents(world) == before


def test_overwrite_starts_anew(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    write(folder, seed=3, num_videos=20)
    write(folder, overwrite=True)
    assert contents(folder) == contents(world)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["annotation/train/83.json", "notes.txt"])
def test_a_folder_of_something_else_is_refused(name: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("theirs")
    with pytest.raises(OutputFolderError, match="holds something else"):
        write(tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == {name: b"theirs"}


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with files.locked(tmp_path / "world"), pytest.raises(OutputFolderError, match="being written"):
        write(tmp_path / "world")


def test_a_disk_that_is_full_ends_in_a_sentence_and_can_be_continued(
    world: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "world"
    largest = min(path.stat().st_size for path in world.glob("videos/*/*/rgb.mp4")) - 1

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    full = subprocess.run(
        command(folder, "--num_videos=10"), preexec_fn=limit, capture_output=True, text=True
    )
    assert full.returncode in (1, 2)
    last = full.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in full.stderr
    write(folder)
    assert contents(folder) == contents(world)


def test_nothing_needs_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from cosmos_posttrain.toy_world.__main__ import main; main();"
        "sys.exit('torch' in sys.modules)"
    )
    arguments = command(tmp_path / "world", "--num_videos=1", "--level=rich")[3:]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=dict(os.environ))
    assert len(contents(tmp_path / "world")) == 6


BAD = [
    ({"output": ""}, "--output is missing"),
    ({"num_videos": 0}, "--num_videos 0 must be at least 1"),
    ({"num_val": 8, "num_test": 8}, "--num_val 8 and --num_test 8 are more than --num_videos 10"),
    ({"level": "hard"}, "--level hard is not one of simple, bouncing, pushed, rich"),
    ({"width": 65}, "--width 65 must be even"),
    ({"height": 16}, "--height 16 must be at least 32"),
    ({"still_frames": 6}, "--still_frames 6 must be at most --num_frames 5"),
    ({"num_objects": 4}, "--num_objects 4 must be at most 3"),
    ({"colors": "red,mauve"}, "--colors red,mauve must name some of white, red, blue"),
    ({"level": "rich", "colors": "red"}, "--colors must name at least 3"),
    ({"shapes": ""}, "--shapes  must name some of ball, box, diamond"),
    ({"diameter": "big"}, "--diameter big must be a number of pixels from 4 up"),
    ({"diameter": "30"}, "--diameter 30 must be at most 24.0 in a picture of 64x48 with a still"),
    ({"level": "rich", "diameter": "20"}, "--diameter 20 must be at most 19.1 in a picture"),
    ({"speed": "3,1"}, "--speed 3,1 must be a number of pixels from 0 up, or least,largest"),
    ({"speed": "nan"}, "--speed nan must be"),
    ({"speed": "9"}, "needs 53 of the picture's 48 pixels in 4 steps: give --bounces"),
    ({"speed": "6", "still_frames": 2}, "needs 53 of the picture's 48 pixels in 3 steps"),
    ({"directions": "6"}, "--directions 6 is not one of 4, 8, any"),
    ({"friction": 1.5}, "--friction 1.5 must be at most 1"),
    ({"fps": 0.0}, "--fps 0.0 must be above 0"),
]


@pytest.mark.parametrize(("values", "problem"), BAD)
def test_a_bad_setting_is_named(values: dict[str, Any], problem: str) -> None:
    config = ToyWorldConfig(**{"output": "world", "num_videos": 10, **SMALL, **values})
    with pytest.raises(ConfigError, match=re.escape(problem)):
        validate(config)


def test_all_bad_settings_are_named_at_once() -> None:
    bad = {"width": 65, "speed": "x", "level": "hard", "num_objects": 9, "friction": -1.0}
    with pytest.raises(ConfigError) as caught:
        validate(ToyWorldConfig(num_videos=10, **{**SMALL, **bad}))
    named = ["--output", "--width", "--speed", "--level", "--num_objects", "--friction"]
    assert [name for name in named if name not in str(caught.value)] == []


def test_a_bad_command_ends_with_one_sentence(tmp_path: Path) -> None:
    ran = subprocess.run(command(tmp_path / "a", "--level=hard"), capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr.strip().splitlines() == [
        "error: --level hard is not one of simple, bouncing, pushed, rich."
    ]
    assert not (tmp_path / "a").exists()


def test_settings_come_from_yaml_too(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("level: rich\ndirections: 4\nnum_videos: 2\ndiameter: 16\n")
    arguments = ["--config", str(tmp_path / "a.yaml"), f"--output={tmp_path / 'w'}"]
    flags = ["--width=64", "--height=48", "--num_frames=5", "--no-bounces", "camera=still"]
    base = [sys.executable, "-m", "cosmos_posttrain.toy_world"]
    subprocess.run([*base, *arguments, *flags], check=True, capture_output=True)
    settings = json.loads((tmp_path / "w" / "world.json").read_text())["settings"]
    assert settings["directions"] == "4"
    assert (settings["camera"], settings["bounces"], settings["num_objects"]) == ("still", False, 3)
