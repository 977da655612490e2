"""Preparation on a GPU: the CPU's tokens but near borders between codes, and no mixture of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.distributed_run import run_script
from helpers.tokenizer_training_case import write_videos

from cosmos_posttrain.data import Manifest, TokenDataset

pytestmark = pytest.mark.gpu


def prepare(videos: Path, output: Path, env: dict[str, str]) -> tuple[int, str]:
    # fmt: off
    command = [
        "prepare_dataset.py", "--input_videos_dir", videos, "--output_prefix", output,
        "--width", "48", "--height", "32", "--num_context_frames", "9",
        "--tokenizer_compression_factor", "4,8,8", "--encoder_path", "tiny-dv4x8x8",
        "--clips_per_video", "2", "--dtype", "float32",
    ]
    # fmt: on
    finished = run_script(command, env=env)
    return finished.returncode, finished.stderr


def test_the_tokens_are_those_of_the_cpu_and_a_folder_holds_one_kind(tmp_path: Path) -> None:
    videos, clips = write_videos(tmp_path / "videos"), {}
    for device, env in {"cpu": {"CUDA_VISIBLE_DEVICES": ""}, "cuda": {}}.items():
        code, said = prepare(videos, tmp_path / device, env)
        assert code == 0, said
        assert Manifest.load(tmp_path / device).plan["encoder_device"] == device
        data = TokenDataset(tmp_path / device, split="all")
        clips[device] = torch.stack([data[i] for i in range(len(data))])
    # Convolutions may round to TF32, which changed up to 0.4% of the tokens (emulated on a CPU).
    assert (clips["cpu"] != clips["cuda"]).float().mean() < 0.03
    code, said = prepare(videos, tmp_path / "cuda", {"CUDA_VISIBLE_DEVICES": ""})
    assert code == 2 and "encoder_device cpu here, cuda there" in said
