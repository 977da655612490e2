"""From a video to an mp4: the prompt is the clip's beginning, files, resuming, two processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers import infer_case
from helpers.distributed_run import REPOSITORY_DIR, kill_tree, run_script
from helpers.infer_case import FRAMES, HEIGHT, LATENT_SHAPE, TOKENIZER, WIDTH, random_config

from cosmos_posttrain import files, load_tokenizer
from cosmos_posttrain.errors import ConfigError, OutputFolderError, PartialFailureError, UserError
from cosmos_posttrain.inference.batch import run
from cosmos_posttrain.inference.config import InferConfig
from cosmos_posttrain.inference.input_lists import BatchLine, output_names
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.video import probe, read_clips, to_float


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return infer_case.write_input(tmp_path / "bar.mp4")


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def read_record(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(path.read_text())
    return values


@pytest.mark.parametrize("name", [TOKENIZER, "tiny-dv4x8x8"])
def test_the_prompt_is_the_prefix_of_the_whole_clips_tokens(
    tmp_path: Path, video: Path, name: str
) -> None:
    session = Session(random_config(video, tmp_path / "out", encoder_path=name))
    result = session.generate(Request(path=video))
    tokenizer = load_tokenizer(name)
    whole = read_clips(video, [0], FRAMES, HEIGHT, WIDTH)[0].frames
    tokens = tokenizer.encode(to_float(whole)[None])[0].long()
    num_given = session.geometry.num_condition_tokens(9)
    assert result.num_condition_tokens == num_given
    assert torch.equal(result.tokens.flatten()[:num_given], tokens.flatten()[:num_given])


def test_a_video_becomes_a_clip_with_its_record(
    tmp_path: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = random_config(video, tmp_path / "out", offload_tokenizer=True, offload_ar_model=True)
    run(config)
    info = probe(tmp_path / "out" / "output.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (FRAMES, HEIGHT, WIDTH, 12.0)
    record = read_record(tmp_path / "out" / "output.json")
    assert record["settings"]["seed"] == 0
    assert record["settings"]["tokenizer"]["sha256"] == load_tokenizer(TOKENIZER).sha256
    assert record["settings"]["latent_shape"] == list(LATENT_SHAPE)
    assert (record["num_condition_tokens"], record["num_generated_tokens"]) == (12, 6)
    # The given frames come back as the tokenizer reconstructs them, up to the mp4's rounding.
    given = read_clips(video, [0], 9, HEIGHT, WIDTH)[0].frames
    tokenizer = load_tokenizer(TOKENIZER)
    expected = tokenizer.decode(tokenizer.encode(to_float(given)[None]))[0]
    written = read_clips(tmp_path / "out" / "output.mp4", [0], 9, HEIGHT, WIDTH)[0].frames
    assert (to_float(written) - expected).abs().mean() < 0.05
    assert "output.mp4: 17 frames of 48x32 at 12 fps" in capsys.readouterr().out


def test_an_output_is_kept_replaced_or_refused(
    tmp_path: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    config = random_config(video, out)
    run(config)
    before = stamps(out)
    run(config)
    assert "complete already" in capsys.readouterr().err
    assert stamps(out) == before
    other = dataclasses.replace(config, seed=1)
    with pytest.raises(OutputFolderError, match=r"not made with these settings.*--overwrite"):
        run(other)
    assert stamps(out) == before
    run(dataclasses.replace(other, overwrite=True))
    assert read_record(out / "output.json")["settings"]["seed"] == 1
    # Stopped between the two files: done again.
    (out / "output.mp4").unlink()
    run(config)
    assert (out / "output.mp4").exists()
    (out / "output.json").write_text("{}")
    with pytest.raises(OutputFolderError, match="not made with these settings"):
        run(config)


def test_an_image_gives_one_frame(tmp_path: Path) -> None:
    import skimage.io

    frame = infer_case.moving_bar(1)[:, 0].permute(1, 2, 0).numpy()
    skimage.io.imsave(tmp_path / "bar.png", frame, check_contrast=False)
    run(random_config(tmp_path / "bar.png", tmp_path / "out", input_type="image"))
    info = probe(tmp_path / "out" / "output.mp4")
    assert (info.num_frames, info.fps) == (FRAMES, 25.0)
    record = read_record(tmp_path / "out" / "output.json")
    assert (record["num_condition_tokens"], record["num_generated_tokens"]) == (6, 12)


def batch_config(folder: Path, *inputs: str, **changes: Any) -> InferConfig:
    """A greedy batch of files in a folder, to its ``out``."""
    jsonl = infer_case.write_jsonl(folder / "batch.jsonl", *inputs)
    values = {"input_image_or_video_path": None, "batch_input_path": str(jsonl), "temperature": 0.0}
    return random_config(folder, folder / "out", **{**values, **changes})


def test_a_batch_is_done_item_by_item(
    tmp_path: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    infer_case.write_input(tmp_path / "short.mp4", num_frames=5)
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 100)
    config = batch_config(tmp_path, "bar.mp4", "broken.mp4", "short.mp4")
    with pytest.raises(PartialFailureError, match=r"1 of 3 inputs.*broken\.mp4"):
        run(config)
    assert sorted(stamps(out)) == ["bar.json", "bar.mp4", "short.json", "short.mp4"]
    assert read_record(out / "short.json")["num_repeated"] == 4
    said = capsys.readouterr()
    assert "its last frame was repeated 4 times" in said.err
    assert "failed: " in said.err and "broken.mp4" in said.err
    # Time left is that of the whole batch: the display counts the tokens of all clips.
    assert "batch: 12/12 tokens, clip 3/3 (short.mp4), " in said.err
    assert said.out == f"wrote 2 clip(s) to {out}\n"
    before = stamps(out)
    (out / "short.mp4").unlink()
    infer_case.write_input(tmp_path / "broken.mp4")
    run(config)
    after = stamps(out)
    assert len(after) == 6
    assert {name: after[name] for name in ("bar.json", "bar.mp4")} == {
        name: before[name] for name in ("bar.json", "bar.mp4")
    }
    # The same input and seed give the same clip, whichever run made it.
    hashes = [read_record(out / f"{name}.json")["tokens_sha256"] for name in ("bar", "broken")]
    assert hashes[0] == hashes[1]


def test_inputs_of_one_name_have_outputs_of_their_own(tmp_path: Path) -> None:
    names = ["a/rgb.mp4", "b/rgb.mp4", "b/c/rgb.mp4", "d/c/rgb.mp4", "other\u2028name.mp4"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        infer_case.write_input(tmp_path / name)
    jsonl = tmp_path / "batch.jsonl"
    # JSON may hold a character that ends a line elsewhere.
    jsonl.write_text("".join(f'{{"visual_input": "{name}"}}\n' for name in names))
    config = batch_config(tmp_path, batch_input_path=str(jsonl))
    jsonl.write_text("".join(f'{{"visual_input": "{name}"}}\n' for name in names))
    run(config)
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.mp4")) == [
        "a_rgb",
        "b_c_rgb",
        "b_rgb",
        "d_c_rgb",
        "other\u2028name",
    ]


def test_names_are_told_apart_or_refused() -> None:
    def names(*inputs: str) -> list[str]:
        return output_names([BatchLine(Path("/data") / name) for name in inputs])

    assert names("a/x.mp4", "a/y.mp4") == ["x", "y"]
    # The longer name of one may be the name of another.
    assert names("a/x.mp4", "b/x.mp4", "c/a_x.mp4") == ["data_a_x", "b_x", "c_a_x"]
    with pytest.raises(ConfigError, match="is named twice"):
        names("a/x.mp4", "a/../a/x.mp4")
    with pytest.raises(ConfigError, match="would have the same output"):
        names("a/x.mp4", "a/x.avi")


def test_an_output_never_replaces_an_input(tmp_path: Path, video: Path) -> None:
    before = video.read_bytes()
    config = random_config(video, tmp_path, video_save_name="bar", overwrite=True)
    batch = batch_config(tmp_path, "bar.mp4", video_save_folder=str(tmp_path), overwrite=True)
    for refused in (config, batch):
        with pytest.raises(ConfigError, match=r"bar\.mp4 is an input and would be replaced"):
            run(refused)
    assert video.read_bytes() == before


@pytest.mark.slow
def test_a_second_run_of_the_same_outputs_is_refused(tmp_path: Path, video: Path) -> None:
    out = tmp_path / "out"
    with files.locked(out, only=["bar.mp4"]):
        finished = run_script(
            [
                "infer.py",
                f"--batch_input_path={infer_case.write_jsonl(tmp_path / 'b.jsonl', 'bar.mp4')}",
                "--ar_model_dir=tiny",
                f"--encoder_path={TOKENIZER}",
                f"--num_context_frames={FRAMES}",
                f"--width={WIDTH}",
                f"--height={HEIGHT}",
                f"--video_save_folder={out}",
                "--disable_diffusion_decoder",
                "--disable_guardrail",
                "--overwrite",
            ]
        )
        # Another name beside it may be written.
        run(random_config(video, out, video_save_name="other"))
    assert finished.returncode == 2
    assert "bar.mp4 is being written by another process" in finished.stderr
    assert finished.stderr.count("\n") == 1
    assert sorted(stamps(out)) == ["other.json", "other.mp4"]


class Killed(BaseException):
    """Stands for the moment in which a process dies."""


@pytest.mark.parametrize("num_renamed", [0, 1])
def test_a_run_that_dies_while_writing_leaves_no_clip_with_a_wrong_record(
    tmp_path: Path, video: Path, monkeypatch: pytest.MonkeyPatch, num_renamed: int
) -> None:
    out = tmp_path / "out"
    run(random_config(video, out))
    config = random_config(video, out, seed=1, overwrite=True)
    replace, renamed = Path.replace, []

    def dying(path: Path, target: Path) -> Path:
        if len(renamed) == num_renamed:
            raise Killed
        renamed.append(target)
        return replace(path, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "replace", dying)
        run(config)
    assert renamed == [out / "output.json"][:num_renamed]
    seed = read_record(out / "output.json")["settings"]["seed"]
    assert (out / "output.mp4").exists() is False
    assert seed == num_renamed
    # Whichever command comes next makes the clip.
    run(random_config(video, out, seed=0))
    assert read_record(out / "output.json")["settings"]["seed"] == 0
    assert sorted(stamps(out)) == ["output.json", "output.mp4"]


def test_a_full_disk_is_one_sentence_and_spoils_nothing(tmp_path: Path, video: Path) -> None:
    out = tmp_path / "out"
    config = random_config(video, out)
    run(config)
    before = stamps(out)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    other = dataclasses.replace(config, seed=1, overwrite=True)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        with pytest.raises(UserError, match=r"cannot write .*output\.mp4: ") as caught:
            run(other)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert stamps(out) == before
    run(other)
    assert read_record(out / "output.json")["settings"]["seed"] == 1


@pytest.mark.slow
def test_the_script_refuses_with_exit_code_2_and_one_line(tmp_path: Path, video: Path) -> None:
    finished = run_script(
        [
            "infer.py",
            f"--input_image_or_video_path={video}",
            "--ar_model_dir=tiny",
            f"--encoder_path={TOKENIZER}",
            "--width=500",
            f"--video_save_folder={tmp_path / 'out'}",
        ]
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: width 500 cannot be encoded at 8x16x16")
    assert finished.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_two_processes_share_the_model(tmp_path: Path, video: Path) -> None:
    # As the original tutorial calls it: no tensor parallel size, all processes are used.
    arguments: list[str | Path] = ["infer.py", "--input_image_or_video_path", video]
    arguments += ["--ar_model_dir", "random:tiny", "--encoder_path", "tiny"]
    arguments += ["--tokenizer_compression_factor", "8,16,16", "--disable_diffusion_decoder"]
    arguments += ["--width", "48", "--height", "32", "--num_context_frames", "17"]
    arguments += ["--video_save_name", tmp_path / "evals" / "two.mp4", "--num_gpus", "2"]
    finished = run_script(arguments, nproc=2)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("wrote ") == 1
    record = read_record(tmp_path / "evals" / "two.json")
    assert record["tensor_model_parallel_size"] == 2
    assert record["command"].startswith("torchrun --nproc-per-node=2 infer.py --input_image_or")
    run(random_config(video, tmp_path / "out"))
    alone = read_record(tmp_path / "out" / "output.json")
    assert record["tokens_sha256"] == alone["tokens_sha256"]


def worker(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The process of a rank below torchrun."""
    for process in psutil.Process(launcher.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.environ().get("RANK") == str(rank) and "infer.py" in process.cmdline():
                return process
    raise AssertionError(f"there is no rank {rank}")


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {seconds} s"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.distributed
def test_groups_share_a_batch_and_none_outlives_a_rank_that_dies(tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = [f"{number:02d}.mp4" for number in range(40)]
    for name in names:
        infer_case.write_input(tmp_path / name)
    (tmp_path / names[1]).write_bytes(b"\0" * 100)  # of the second group, in the first round
    jsonl = infer_case.write_jsonl(tmp_path / "batch.jsonl", *names)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["infer.py", "--batch_input_path", str(jsonl), "--ar_model_dir", "random:tiny"]
    command += ["--encoder_path", TOKENIZER, "--disable_diffusion_decoder"]
    command += ["--tensor_model_parallel_size", "1", "--video_save_folder", str(out)]
    command += ["--width", "96", "--height", "64", "--num_context_frames", "17"]
    command += ["--batch_size", "2", "--temperature", "0"]
    with subprocess.Popen(
        command, cwd=REPOSITORY_DIR, stderr=subprocess.PIPE, text=True
    ) as launcher:
        try:
            wait_until(lambda: len(list(out.glob("[0-9]*.mp4"))) >= 3, "a third clip")
            worker(launcher, 1).kill()
            _, said = launcher.communicate(timeout=60)
        finally:
            kill_tree(launcher.pid)
    assert launcher.returncode == 1
    assert "failed: " in said and names[1] in said
    before = stamps(out)
    videos = list(out.glob("[0-9]*.mp4"))
    assert 3 <= len(videos) < len(names) - 1
    assert all(video.with_suffix(".json").exists() for video in videos)
    finished = run_script(command[5:], nproc=2)
    assert finished.returncode == 1
    assert f"1 of {len(names) - len(videos)} inputs could not be read" in finished.stderr
    assert f"{len(videos)} output(s) are complete already" in finished.stderr
    after = stamps(out)
    expected = {Path(name).stem for name in names} - {Path(names[1]).stem}
    assert {Path(name).stem for name in after} == expected
    assert len(after) == 2 * len(expected)
    done = {name for video in videos for name in (video.name, f"{video.stem}.json")}
    assert {name: after[name] for name in done} == {name: before[name] for name in done}
    # One input: whichever group made the clip, and in whichever run, the tokens are the same.
    assert len({read_record(out / f"{stem}.json")["tokens_sha256"] for stem in expected}) == 1
