"""From a video to an mp4: the prompt is the clip's beginning, files, resuming, two processes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import infer_case
from helpers.distributed_run import run_script
from helpers.infer_case import FRAMES, HEIGHT, LATENT_SHAPE, TOKENIZER, WIDTH, random_config

from cosmos_posttrain import load_tokenizer
from cosmos_posttrain.errors import OutputFolderError, PartialFailureError
from cosmos_posttrain.inference.batch import run
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


def test_a_batch_is_done_item_by_item(
    tmp_path: Path, video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    infer_case.write_input(tmp_path / "short.mp4", num_frames=5)
    (tmp_path / "broken.mp4").write_bytes(b"\0" * 100)
    jsonl = infer_case.write_jsonl(tmp_path / "batch.jsonl", "bar.mp4", "broken.mp4", "short.mp4")
    config = random_config(
        video, out, input_image_or_video_path=None, batch_input_path=str(jsonl), temperature=0.0
    )
    with pytest.raises(PartialFailureError, match=r"1 of 3 inputs.*broken\.mp4"):
        run(config)
    assert sorted(stamps(out)) == ["bar.json", "bar.mp4", "short.json", "short.mp4"]
    assert read_record(out / "short.json")["num_repeated"] == 4
    assert "its last frame was repeated 4 times" in capsys.readouterr().err
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
    arguments += ["--video_save_name", tmp_path / "evals" / "two.mp4"]
    finished = run_script(arguments, nproc=2)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("wrote ") == 1
    record = read_record(tmp_path / "evals" / "two.json")
    assert record["tensor_model_parallel_size"] == 2
    run(random_config(video, tmp_path / "out"))
    alone = read_record(tmp_path / "out" / "output.json")
    assert record["tokens_sha256"] == alone["tokens_sha256"]
