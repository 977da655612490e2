"""``evaluate.py tokenizer``: figures, refusals, kills and continuations."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cosmos_posttrain import files
from cosmos_posttrain.errors import PartialFailureError, TokenizerError, UserError
from cosmos_posttrain.evaluation import media, quality
from cosmos_posttrain.evaluation import tokenizer as evaluation
from cosmos_posttrain.evaluation.config.tokenizer import TokenizerEvalConfig
from cosmos_posttrain.geometry import Compression
from cosmos_posttrain.tokenizer import load_tokenizer
from cosmos_posttrain.video import (
    decoder_label,
    decoder_name,
    read_clips,
    to_float,
    to_uint8,
    write_mp4,
)

REPOSITORY_DIR = Path(__file__).resolve().parents[2]
TOKENIZER = "tiny-dv4x8x8"
SPEEDS = ("seconds", "_frames_per_second")


def moving_frames(num_frames: int, height: int, width: int, shift: int) -> torch.Tensor:
    """(3, T, H, W) uint8: smooth colours that move."""
    rows, columns = np.mgrid[:height, :width]
    frames = [
        np.stack([np.sin((columns + c * rows / 3 + shift + 2 * t) / 9) for c in range(3)])
        for t in range(num_frames)
    ]
    return torch.from_numpy((np.stack(frames, 1) * 100 + 128).astype(np.uint8))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of 11 and 9 frames, and a picture of 44x29 pixels in a subfolder."""
    folder = tmp_path_factory.mktemp("videos")
    write_mp4(folder / "a.mp4", moving_frames(11, 32, 48, 0), fps=10)
    write_mp4(folder / "b.mp4", moving_frames(9, 32, 48, 30), fps=10)
    (folder / "stills").mkdir()
    pixels = moving_frames(1, 29, 44, 60)[:, 0].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / "stills" / "c.PNG")
    return folder


def config_of(folder: Path, output: Path, **changes: Any) -> TokenizerEvalConfig:
    values = {"tokenizer": TOKENIZER, "device": "cpu", "output_dir": str(output)}
    return TokenizerEvalConfig(**({"videos": str(folder)} | values | changes))


def without_speed(value: Any) -> Any:
    """Metrics without what differs from run to run."""
    if isinstance(value, dict):
        return {k: without_speed(v) for k, v in value.items() if not k.endswith(SPEEDS)}
    return [without_speed(v) for v in value] if isinstance(value, list) else value


def test_the_figures_are_those_of_the_clips(videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    metrics = evaluation.run(config_of(videos, output))
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert sorted(path.name for path in output.iterdir()) == ["contact_sheet.png", "metrics.json"]
    assert metrics["settings"]["videos_read_by"] == decoder_name()
    assert metrics["environment"]["videos_read_by"] == decoder_label()
    rows = metrics["videos"]
    assert [row["video"] for row in rows] == ["a.mp4", "b.mp4", "stills/c.PNG"]
    sizes = [(row["num_frames"], row["height"], row["width"]) for row in rows]
    # 11 frames are cut to 1 + 2 * 4, and 44x29 pixels to whole 8x8 blocks.
    assert sizes == [(9, 32, 48), (9, 32, 48), (1, 24, 40)]
    assert [g["latent_shape"] for g in metrics["geometries"]] == [[3, 4, 6], [1, 3, 5]]
    assert [g["num_clips"] for g in metrics["geometries"]] == [2, 1]

    tokenizer = load_tokenizer(TOKENIZER, device="cpu")
    clip = read_clips(videos / "a.mp4", [0], 9, 32, 48)[0].frames
    indices = tokenizer.encode(to_float(clip)[None])
    rebuilt = to_uint8(tokenizer.decode(indices))[0]
    assert rows[0]["psnr"] == pytest.approx(quality.psnr(clip, rebuilt))
    assert rows[0]["ssim"] == pytest.approx(quality.ssim(clip, rebuilt))
    assert rows[0]["codes_used"] == indices.unique().numel()
    assert rows[0]["num_tokens"] == 72

    assert metrics["num_clips"] == 3
    assert metrics["psnr"] == pytest.approx(sum(row["psnr"] for row in rows) / 3)
    assert metrics["ssim"] == pytest.approx(sum(row["ssim"] for row in rows) / 3)
    assert metrics["num_tokens"] == 72 + 72 + 15
    counts = [row["codes_used"] for row in rows]
    assert max(counts) <= metrics["codes_used"] <= sum(counts)
    assert metrics["vocabulary_share"] == metrics["codes_used"] / 1000
    assert 0 < metrics["entropy_bits"] <= metrics["max_entropy_bits"]
    seconds = sum(row["encode_seconds"] for row in rows)
    assert metrics["encode_frames_per_second"] == pytest.approx(19 / seconds)


def test_the_settings_say_what_was_measured(videos: Path, tmp_path: Path) -> None:
    settings = evaluation.run(config_of(videos, tmp_path, max_videos=1))["settings"]
    tokenizer = load_tokenizer(TOKENIZER, device="cpu")
    assert settings["tokenizer"] == {
        "id": TOKENIZER,
        "sha256": tokenizer.sha256,
        "compression": [4, 8, 8],
        "levels": [8, 5, 5, 5],
        "vocab_size": 1000,
    }
    assert (settings["device"], settings["dtype"]) == ("cpu", "float32")
    assert settings["num_threads"] == torch.get_num_threads()


def test_own_size_is_a_crop_without_resampling(videos: Path) -> None:
    clip = media.read_clip(videos / "stills" / "c.PNG", TokenizerEvalConfig(), Compression(4, 8, 8))
    assert torch.equal(clip, moving_frames(1, 29, 44, 60)[:, :, 2:26, 2:42])


def test_a_size_and_a_length_can_be_asked_for(videos: Path, tmp_path: Path) -> None:
    config = config_of(videos, tmp_path, width=24, height=16, num_frames=5, max_videos=2)
    metrics = evaluation.run(config)
    sizes = [(row["num_frames"], row["height"], row["width"]) for row in metrics["videos"]]
    assert sizes == [(5, 16, 24)] * 2


def test_batches_give_the_same_figures(videos: Path, tmp_path: Path) -> None:
    one = evaluation.run(config_of(videos, tmp_path / "one"))
    two = evaluation.run(config_of(videos, tmp_path / "two", batch_size=2))
    for alone, together in zip(one["videos"], two["videos"], strict=True):
        # Batched convolutions round differently, which may move a latent over a rounding tie.
        assert together["psnr"] == pytest.approx(alone["psnr"], abs=0.05)
        assert together["video"] == alone["video"]


def test_a_killed_run_continues_where_it_was(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    whole = evaluation.run(config_of(videos, tmp_path / "whole"))
    config = config_of(videos, tmp_path / "killed")
    measured = evaluation._measure
    calls = iter(range(100))

    def stop_at_the_second(*clips: torch.Tensor) -> dict[str, float]:
        if next(calls) == 1:
            raise KeyboardInterrupt
        return measured(*clips)

    monkeypatch.setattr(evaluation, "_measure", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run(config)
    assert not (tmp_path / "killed" / "metrics.json").exists()
    with (tmp_path / "killed" / "rows.jsonl").open("a") as file:
        file.write('{"video": "b.mp4", "psn')  # killed within a write

    with pytest.raises(UserError, match=r"holds another .*\(num_frames 5 here, None there\)"):
        evaluation.run(config_of(videos, tmp_path / "killed", num_frames=5))
    seen: list[str] = []

    def counted(clip: torch.Tensor, rebuilt: torch.Tensor) -> dict[str, float]:
        seen.append("video")
        return measured(clip, rebuilt)

    monkeypatch.setattr(evaluation, "_measure", counted)
    # While another process measures the rest, nobody else may.
    with files.locked(tmp_path / "killed"), pytest.raises(UserError, match="is being written"):
        evaluation.run(config)
    capsys.readouterr()
    metrics = evaluation.run(config)
    assert len(seen) == 2
    assert "1 videos are done" in capsys.readouterr().out
    assert without_speed(metrics) == without_speed(whole)
    assert sorted(p.name for p in config.output.iterdir()) == ["contact_sheet.png", "metrics.json"]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 is how a zip begins", b"text"])
def test_damaged_counts_are_counted_again(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    config = config_of(videos, tmp_path / "out", max_videos=2)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluation, "_draw_sheet", stop)
        evaluation.run(config)
    (tmp_path / "out" / "sums.npz").write_bytes(damage)
    assert evaluation.run(config)["num_tokens"] == 144


def test_a_complete_folder_is_left_alone_and_another_evaluation_is_refused(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out"
    evaluation.run(config_of(videos, output, max_videos=1))
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    evaluation.run(config_of(videos, output, max_videos=1))
    assert "complete already" in capsys.readouterr().out
    other = config_of(videos, output, tokenizer="tiny-dv8x8x8", max_videos=1)
    with pytest.raises(UserError, match="holds another evaluation"):
        evaluation.run(other)
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    other.overwrite = True
    assert evaluation.run(other)["geometries"][0]["latent_shape"] == [2, 4, 6]


def test_an_unreadable_video_fails_alone(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_bytes((videos / "a.mp4").read_bytes())
    (folder / "bad.mp4").write_bytes(b"\0" * 100)
    write_mp4(folder / "c.mp4", moving_frames(5, 32, 48, 0), fps=10)
    write_mp4(folder / "thin.mp4", moving_frames(5, 6, 48, 0), fps=10)
    config = config_of(folder, folder / "results")  # its pictures must not become inputs
    for _ in range(2):  # the second run finds it complete
        with pytest.raises(PartialFailureError, match="2 of 4 videos could not be read"):
            evaluation.run(config)
    assert "bad.mp4" in capsys.readouterr().err
    metrics = json.loads((folder / "results" / "metrics.json").read_text())
    assert [row["video"] for row in metrics["videos"]] == ["a.mp4", "c.mp4"]
    assert [row["video"] for row in metrics["failures"]] == ["bad.mp4", "thin.mp4"]
    assert "48x6 pixels, less than a block" in metrics["failures"][1]["error"]
    config.max_failures = 2
    assert evaluation.run(config)["num_failures"] == 2


def test_nothing_readable_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "bad.mp4").touch()
    with pytest.raises(PartialFailureError, match=r"none of the videos could be read.*empty"):
        evaluation.run(config_of(tmp_path / "videos", tmp_path / "out", max_failures=9))
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": ""}, "--tokenizer is missing"),
        ({"videos": "", "batch_size": 0}, "--batch_size 0 must be at least 1; --videos is missing"),
        ({"tokenizer": "no/such/folder"}, "no/such/folder"),
        ({"tokenizer": "tiny-dv9x9x9"}, "tiny-dv9x9x9 does not exist"),
        ({"decoder": "tiny-dv8x8x8"}, "4x8x8 and the decoder's 8x8x8"),
        ({"videos": "nowhere"}, "the video folder nowhere does not exist"),
        ({"videos": "empty"}, "holds no video and no image"),
        ({"width": 64}, "--width and --height go together"),
        ({"width": 60, "height": 64}, "width 60 cannot be encoded at 4x8x8.*use 56 or 64"),
        ({"num_frames": 16}, "16 frames cannot be encoded at 4x8x8.*use 13 or 17"),
        ({"max_videos": 0}, "--max_videos 0 must be at least 1"),
        ({"max_failures": -1}, "--max_failures -1 must be at least 0"),
        ({"device": "tpu9"}, "--device tpu9 is not one of auto, cpu, cuda"),
        ({"dtype": "int32"}, "--dtype int32 is not one of bfloat16, float16, float32"),
        ({"output_dir": "notes"}, "holds something else .todo.txt"),
        ({"output_dir": "notes/todo.txt"}, "is a file"),
    ],
)
def test_bad_usage_is_one_sentence_and_nothing_is_written(
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").touch()
    with pytest.raises(UserError, match=message) as caught:
        evaluation.run(config_of(videos, tmp_path / "out", **changes))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert len(list(tmp_path.rglob("*"))) == 3


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        ("tiny-dv4x8x8", "tiny-dv4x8x8"),
        ("nvidia/Cosmos-0.1-Tokenizer-DV4x8x8", "Cosmos-0.1-Tokenizer-DV4x8x8"),
        ("runs/mine/", "mine"),
        ("runs/mine/encoder.jit", "mine"),
    ],
)
def test_the_default_folder_is_named_after_the_tokenizer(tokenizer: str, name: str) -> None:
    output = TokenizerEvalConfig(tokenizer=tokenizer).output
    assert output == Path("evaluation/tokenizer") / name


@pytest.fixture(scope="module")
def script() -> Iterator[list[str]]:
    yield [sys.executable, "-X", "importtime", str(REPOSITORY_DIR / "evaluate.py")]


@pytest.mark.parametrize("arguments", [["--help"], ["tokenizer", "--help"]])
def test_help_is_there_without_torch(script: list[str], arguments: list[str]) -> None:
    done = subprocess.run([*script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "usage: evaluate.py" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert imported & {"torch", "av", "matplotlib", "skimage", "rich"} == set()
    assert "cosmos_posttrain.cli" in imported


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: a command is missing; use evaluate.py tokenbench or loss or"),
        (["picture"], "error: there is no command 'picture'"),
        (["tokenizer", "--colour", "1"], "error: unrecognized arguments: --colour"),
    ],
)
def test_a_bad_command_line_exits_with_2(
    script: list[str], arguments: list[str], message: str
) -> None:
    done = subprocess.run([*script, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_tokenizer_that_cannot_take_the_clips_leaves_nothing_behind(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer(TOKENIZER, device="cpu")

    def refuse(video: torch.Tensor) -> torch.Tensor:
        raise TokenizerError("it cannot take clips of this size.")

    monkeypatch.setattr(tokenizer, "encode", refuse)
    monkeypatch.setattr(evaluation, "load_tokenizer_pair", lambda *_, **__: tokenizer)
    with pytest.raises(TokenizerError, match="of this size"):
        evaluation.run(config_of(videos, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
