"""From annotated videos in Bridge's layout to a jsonl file that preparation reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.distributed_run import REPOSITORY_DIR

from cosmos_posttrain.prepare.sources import from_jsonl


def bridge_prompts(folder: Path, output: Path, split: str = "train") -> tuple[int, str]:
    words = ["--input_dir", str(folder), "--split", split, "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "recipes/bridge_prompts.py", *words],
        cwd=REPOSITORY_DIR,
        env={"PYTHONPATH": str(REPOSITORY_DIR)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def bridge(tmp_path: Path) -> Path:
    folder = tmp_path / "bridge"
    for number, texts in ((10, ["put the corn in the pot"]), (9, ["move it", "push it "]), (8, [])):
        video = folder / "videos" / "train" / str(number) / "rgb.mp4"
        video.parent.mkdir(parents=True)
        video.touch()
        annotation = folder / "annotation" / "train" / f"{number}.json"
        annotation.parent.mkdir(parents=True, exist_ok=True)
        videos = [{"video_path": f"videos/train/{number}/rgb.mp4"}]
        annotation.write_text(json.dumps({"texts": texts, "videos": videos, "action": [[0] * 7]}))
    return folder


@pytest.mark.parametrize("place", ["bridge/prompts.jsonl", "elsewhere/prompts.jsonl"])
def test_each_text_of_each_video_is_a_line(bridge: Path, tmp_path: Path, place: str) -> None:
    output = tmp_path / place
    output.parent.mkdir(exist_ok=True)
    code, said = bridge_prompts(bridge, output)
    assert code == 0 and "wrote 3 lines" in said and "1 of 3 episodes have no text" in said
    sources = from_jsonl(output)
    assert [source.prompt for source in sources] == [
        "move it",
        "push it",
        "put the corn in the pot",
    ]
    assert all(source.path.resolve().is_file() for source in sources)
    names = [json.loads(line)["visual_input"] for line in output.read_text().splitlines()]
    assert Path(names[0]).is_absolute() == place.startswith("elsewhere")


def test_what_is_no_annotation_is_named(bridge: Path, tmp_path: Path) -> None:
    code, said = bridge_prompts(bridge, tmp_path / "a.jsonl", "test")
    assert code == 2 and "holds no annotation/test/*.json" in said
    (bridge / "annotation" / "train" / "9.json").write_text('{"texts": "move it"}')
    code, said = bridge_prompts(bridge, tmp_path / "a.jsonl")
    assert code == 2 and "9.json is no annotation" in said
    assert not (tmp_path / "a.jsonl").exists()
