"""Runs on several data sets with shares, and on a choice of each video's clips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.distributed_run import run_distributed, run_script
from helpers.prepared import make_videos, prepare_small
from helpers.run_case import losses, make_config, run

from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.errors import ConfigError, DatasetError


@pytest.fixture(scope="module")
def more_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another data set: eight videos, three of which have the names of those of ``tokens``."""
    folder = tmp_path_factory.mktemp("more")
    (folder / "videos").mkdir()
    videos = make_videos(folder / "videos", num_videos=8, num_frames=24)
    for number in range(5):
        (videos / f"{number}.mp4").rename(videos / f"other-{number}.mp4")
    for number in (5, 6, 7):
        (videos / f"{number}.mp4").rename(videos / f"{number - 5}.mp4")
    prepare_small(videos, folder / "tokens")
    return folder / "tokens"


SETTINGS = {"max_steps": 8, "save_every_n_steps": 4, "data__clips_per_video_per_epoch": 1}


@pytest.fixture(scope="module")
def whole(tokens: Path, more_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    log_dir = tmp_path_factory.mktemp("whole") / "run"
    run(make_config(tokens, log_dir, data__path=f"{tokens}:0.7,{more_tokens}:0.3", **SETTINGS))
    return log_dir


def test_the_checkpoint_records_all_sets(tokens: Path, more_tokens: Path, whole: Path) -> None:
    (newest,) = (whole / "default" / "checkpoints").glob("*step=7")
    recorded = json.loads((newest / "context" / "data.json").read_text())
    fingerprints = [TokenDataset(path).fingerprints[0] for path in (tokens, more_tokens)]
    assert recorded["sampling"] == {
        "datasets": fingerprints,
        "weights": [0.7, 0.3],
        "clips_per_video_per_epoch": 1,
    }
    assert recorded["contract"]["tokenizer"]["id"] == "block-mean"


def test_a_resumed_run_draws_the_same_clips(
    tokens: Path, more_tokens: Path, whole: Path, tmp_path: Path
) -> None:
    """And from a list, as YAML has it."""
    log_dir = tmp_path / "run"
    shutil.copytree(whole, log_dir)
    shutil.rmtree(next((log_dir / "default" / "checkpoints").glob("*step=7")))
    paths = [f"{tokens}:0.7", f"{more_tokens}:0.3"]
    run(make_config(tokens, log_dir, data__path=paths, **SETTINGS))
    assert losses(log_dir) == losses(whole)
    rows = (log_dir / "default" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["epoch"] > 1


@pytest.mark.distributed
def test_two_ranks_draw_the_same_clips(
    tokens: Path, more_tokens: Path, whole: Path, tmp_path: Path
) -> None:
    paths = f"{tokens}:0.7,{more_tokens}:0.3"
    run_distributed(run, 2, make_config(tokens, tmp_path / "run", data__path=paths, **SETTINGS))
    for ours, theirs in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        assert abs(ours - theirs) <= 1e-5 * theirs


def test_other_shares_are_other_data(tokens: Path, more_tokens: Path, whole: Path) -> None:
    for path in (f"{tokens}:0.6,{more_tokens}:0.4", f"{tokens},{more_tokens}"):
        with pytest.raises(ConfigError, match=r"was trained on other data.*sampling"):
            run(make_config(tokens, whole, data__path=path, **SETTINGS))
    changed = SETTINGS | {"data__clips_per_video_per_epoch": 2}
    with pytest.raises(ConfigError, match=r"was trained on other data.*sampling"):
        run(make_config(tokens, whole, data__path=f"{tokens}:0.7,{more_tokens}:0.3", **changed))


def test_a_video_of_two_sets_falls_in_one_split(tokens: Path, more_tokens: Path) -> None:
    found: dict[str, set[str]] = {}
    sets = set()
    for split in ("train", "validation", "test"):
        clips = TokenDataset([tokens, more_tokens], split, "5,3,2", seed=3)
        for number in range(len(clips)):
            found.setdefault(clips.source(number), set()).add(split)
        sets |= {(split, int(number)) for number in clips.set_numbers()}
    assert len(found) == 10 and all(len(splits) == 1 for splits in found.values())
    assert {("train", 0), ("train", 1)} <= sets


def test_sets_of_other_geometry_are_refused(
    tokens: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = tmp_path_factory.mktemp("wide")
    (folder / "videos").mkdir()
    prepare_small(make_videos(folder / "videos", 3), folder / "tokens", width=32)
    config = make_config(tokens, tmp_path / "run", data__path=f"{tokens}:1,{folder / 'tokens'}:1")
    with pytest.raises(DatasetError, match="cannot be used together"):
        run(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_malformed_path_is_one_of_all_problems(tokens: Path, tmp_path: Path) -> None:
    arguments = ["train_general.py", "--data_path", f"{tokens}:0.5,b", "--lr", "-1"]
    finished = run_script([*arguments, "--log_dir", tmp_path / "run"])
    assert finished.returncode == 2
    assert "gives a share to some of the sets only" in finished.stderr
    assert "--lr -1.0 must be above 0" in finished.stderr
