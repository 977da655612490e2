"""The recipe of a whole swap: its commands for the published models, and all of it in miniature."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.distributed_run import REPOSITORY_DIR, run_script
from helpers.prepared import make_videos

from cosmos_posttrain.cli import parse
from cosmos_posttrain.evaluation.commands import COMMANDS
from cosmos_posttrain.evaluation.figures import read_metrics
from cosmos_posttrain.plan.command import FLAGS as TRAIN_FLAGS
from cosmos_posttrain.plan.command import TrainCommand
from cosmos_posttrain.prepare.config import FLAGS as PREPARE_FLAGS
from cosmos_posttrain.prepare.config import PrepareConfig
from cosmos_posttrain.transfer.config import FLAGS as TRANSFER_FLAGS
from cosmos_posttrain.transfer.config import AlignConfig

# Notes its arguments and does nothing.
PYTHON = """#!/bin/sh
printf '%s\\0' "$@" >> "$NOTED"
printf '\\0' >> "$NOTED"
"""


def swap(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "recipes/swap.sh", *map(str, arguments)],
        cwd=REPOSITORY_DIR,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def parsed(words: list[str]) -> tuple[str, object]:
    """A command's script, and its settings; fails where a flag does not exist."""
    if words[:2] == ["-m", "torch.distributed.run"]:
        words = words[5:]
    name, rest = words[0], words[1:]
    if words[:2] == ["-m", "cosmos_posttrain.transfer"]:
        return "transfer", parse(AlignConfig, TRANSFER_FLAGS, words[2:], name, "")
    if name == "prepare_dataset.py":
        return name, parse(PrepareConfig, PREPARE_FLAGS, rest, name, "")
    if name == "evaluate.py":
        command = COMMANDS[rest[0]]
        return rest[0], parse(command.config_class, command.flags, rest[1:], name, "")
    return name, parse(TrainCommand, TRAIN_FLAGS, rest, name, "")


@pytest.mark.parametrize(
    ("model", "tokenizer", "gpus"),
    [
        ("4B", "DV4x8x8", 8),
        ("4B", "DV8x8x8", 1),
        ("12B", "DV8x8x8", 8),
        ("5B-Video2World", "DV4x8x8", 8),
        ("13B-Video2World", "DV8x8x8", 8),
    ],
)
def test_commands_of_the_published_models(
    model: str, tokenizer: str, gpus: int, tmp_path: Path
) -> None:
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    source = ["--prompts", "a.jsonl"] if "Video2World" in model else ["--videos", "clips"]
    finished = swap(
        *source,
        *("--output", tmp_path / "out", "--model", model, "--tokenizer", tokenizer),
        *("--gpus", gpus, "--", "--max_steps", 7),
        NOTED=str(tmp_path / "noted"),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert finished.returncode == 0, finished.stderr
    calls = [call.split("\0") for call in (tmp_path / "noted").read_text().split("\0\0")[:-1]]
    commands = [parsed(words) for words in calls]
    script = "train_video2world.py" if "Video2World" in model else "train_general.py"
    assert [name for name, _ in commands] == [
        *("prepare_dataset.py", "prepare_dataset.py", "transfer"),
        *(script, script, "loss", "generate", "report"),
    ]
    assert all(f"--nproc-per-node {gpus}" in " ".join(calls[i]) for i in (0, 1, 4, 5, 6))
    new, old = (settings for _, settings in commands[:2])
    assert isinstance(new, PrepareConfig) and isinstance(old, PrepareConfig)
    # Each clip has as many tokens under both: 5 x 40 x 64.
    assert (old.num_context_frames, old.height, old.width) == (33, 640, 1024)
    assert (new.height, new.width) == (320, 512)
    rate = int(new.tokenizer_compression_factor[0])
    assert (new.num_context_frames - 1) // rate + 1 == 5
    assert (new.text_encoder_path is not None) == ("Video2World" in model)
    dry, real = commands[3][1], commands[4][1]
    assert isinstance(dry, TrainCommand) and isinstance(real, TrainCommand)
    assert dry.dry_run and dry.num_gpus == gpus and not real.dry_run
    assert real.run_config.max_steps == 7
    assert model in str(real.run_config.model.path)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--output is missing"),
        (["--output", "o"], "4B is trained on --videos DIR"),
        (["--output", "o", "--model", "5B-Video2World", "--videos", "v"], "on --prompts FILE"),
        (["--output", "o", "--model", "7B"], "--model 7B is not one of"),
        (["--output", "o", "--videos", "v", "--tokenizer", "CV"], "--tokenizer CV is not one of"),
        (["--output", "o", "--videos", "v", "--gpus", "3"], "no config is shipped for 4B on 3"),
        (["--videos"], "--videos needs a value"),
        (["--vidoes", "v"], "unknown argument --vidoes"),
    ],
)
def test_refusals(arguments: list[str], sentence: str) -> None:
    finished = swap(*arguments)
    assert finished.returncode == 2
    assert sentence in finished.stderr and finished.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("is_text", [False, True], ids=["4B", "5B-Video2World"])
def test_in_miniature_twice(is_text: bool, tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    make_videos(videos, 4, num_frames=36)
    lines = [{"prompt": f"grey {i}", "visual_input": f"{i}.mp4"} for i in range(4)]
    prompts = videos / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)) + "\n")
    source = ["--input_jsonl", prompts] if is_text else ["--input_videos_dir", videos]
    text = ["--text_encoder_path", "tiny"] if is_text else []
    script = "train_video2world.py" if is_text else "train_general.py"
    tiny = "random:tiny-video2world" if is_text else "random:tiny"
    prepared = run_script(
        [
            *("prepare_dataset.py", *source, *text, "--output_prefix", tmp_path / "old"),
            *"--encoder_path tiny-dv8x16x16 --decoder_path tiny-dv8x16x16 --width 96".split(),
            *"--tokenizer_compression_factor 8,16,16 --height 64 --num_context_frames 33".split(),
        ]
    )
    assert prepared.returncode == 0, prepared.stderr
    shared = "--tensor_model_parallel_size 1 --global_batch_size 2".split()
    trained = run_script(
        [
            *(script, "--data_path", tmp_path / "old", "--log_dir", tmp_path / "model"),
            *("--model_path", tiny, "--max_steps", "2", "--split_string", "2,1,1", *shared),
        ]
    )
    assert trained.returncode == 0, trained.stderr
    config = tmp_path / "tiny.yaml"
    config.write_text("max_steps: 3\nnum_threads: 1\n")
    arguments = ["--prompts", prompts] if is_text else ["--videos", videos]
    arguments += ["--output", out, "--gpus", 2, "--config", config, "--split_string", "2,1,1"]
    arguments += ["--model", "5B-Video2World" if is_text else "4B", "--", *shared]
    environment = {
        "MODEL_PATH": str(tmp_path / "model"),
        "OLD_TOKENIZER": "tiny-dv8x16x16",
        "NEW_TOKENIZER": "tiny-dv4x8x8",
        "TEXT_ENCODER": "tiny",
        "WIDTH": "48",
        "HEIGHT": "32",
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY_DIR),
    }
    first = swap(*arguments, **environment)
    assert first.returncode == 0, first.stderr
    assert len(read_metrics(out / "run")) == 3
    assert "embedding_init" in (out / "run" / "default" / "config.yaml").read_text()
    for name in ("run/evaluation/loss", "run/evaluation/generate"):
        assert (out / name / "metrics.json").is_file()
    assert (out / "report.html").stat().st_size > 1000
    second = swap(*arguments, **environment)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("is complete already") == 4  # data and evaluations
    assert second.stdout.count("nothing to do: ") == 1
