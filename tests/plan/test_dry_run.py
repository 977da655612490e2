"""``--dry_run`` of the training scripts: what it says and refuses, and that it changes nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.distributed_run import REPOSITORY_DIR, run_script
from helpers.full_size_data import write_full_size_clips, write_full_size_prompts
from helpers.prepared import write_data_set
from helpers.run_case import make_config

from cosmos_posttrain.cli import parse
from cosmos_posttrain.config import merge
from cosmos_posttrain.errors import UserError
from cosmos_posttrain.nemo import extra as nemo
from cosmos_posttrain.plan import dry_run
from cosmos_posttrain.plan.command import FLAGS, TrainCommand
from cosmos_posttrain.plan.layouts import GIB
from cosmos_posttrain.plan.looking import look_at_source
from cosmos_posttrain.plan.memory import (
    Layout,
    Workload,
    checkpoint_bytes,
    memory,
    offloaded_bytes,
)
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.trainer import train


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder: size and time of the last change."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in (folder, *folder.rglob("*"))
    }


def look(capsys: pytest.CaptureFixture, words: list[str], takes_text: bool = False) -> str:
    """What is printed by a dry run that finds nothing wrong."""
    command: Any = parse(TrainCommand, FLAGS, [*words, "--dry_run"], "train", "")
    capsys.readouterr()
    assert dry_run.show(command, takes_text) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_full_size_clips(tmp_path_factory.mktemp("clips") / "clips")


@pytest.fixture
def much_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of 10 TB."""
    monkeypatch.setattr("cosmos_posttrain.files.free_bytes", lambda folder: 10**13)


def twelve_b(clips: Path, log_dir: Path, *more: str) -> list[str]:
    config = REPOSITORY_DIR / "configs" / "train_12b_64gpu.yaml"
    words = ["--config", str(config), "--data_path", str(clips), "--log_dir", str(log_dir)]
    return [*words, "--num_gpus", "64", *more]


def test_12b_on_64_gpus(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture, much_room: None
) -> None:
    before = listing(tmp_path), listing(clips)
    text = look(capsys, twelve_b(clips, tmp_path / "run"))
    assert (listing(tmp_path), listing(clips)) == before
    assert "64 processes on 8 machines: TP 4, PP 1, CP 1, DP 16, sequence parallelism" in text
    assert "16 tensor-parallel groups of 4, the first of ranks 0, 1, 2, 3" in text
    assert "4 data-parallel groups of 16, the first of ranks 0, 4, 8, 12, ..., 60" in text
    work = Workload(look_at_source("nvidia/Cosmos-1.0-Autoregressive-12B").config, 1, 64)
    needed = memory(work, Layout(4, data=16, sequence_parallel=True)).total / GIB
    assert f"ranks 0 to 63: {needed:.1f} of 80 GiB" in text
    assert "8 clips to train on, 1 to validate on, 1 to test on" in text
    assert "150 steps of 64 are 9,600 samples, 1200.00 epochs, 122,880,000 tokens" in text
    size = checkpoint_bytes(work)
    assert f"6 to be written, every 25 steps and at the end, {size / 1e9:,.3f} GB each" in text
    assert f"at most 4 more at once than now: {4 * size / 1e9:,.3f} GB of 10,000.000 GB" in text
    assert re.search(r"--async_save: up to [\d.]+ GB of host memory a process", text)
    config = text.partition("config:\n")[2].partition("\n\n")[0]
    (tmp_path / "shown.yaml").write_text(config)
    shown = merge(TrainConfig, tmp_path / "shown.yaml")
    words = twelve_b(clips, tmp_path / "run")
    command: Any = parse(TrainCommand, FLAGS, words, "train", "")
    assert shown == command.run_config


def test_what_changes_memory_and_time(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture, much_room: None
) -> None:
    sizes = "--pipeline_model_parallel_size 4 --global_batch_size 64"
    words = twelve_b(clips, tmp_path / "run", *sizes.split(), "--gpu_memory_gb", "180")
    more = "--virtual_pipeline_model_parallel_size 2 --grad_reduce_in_bf16".split()
    plain, changed = look(capsys, words), look(capsys, [*words, *more])
    assert "interleaved" not in plain.partition("memory")[0]
    assert "PP 4, CP 1, DP 4, sequence parallelism, interleaved in 2 parts" in changed
    of = [dict(re.findall(r"(gradients|activations) ([\d.]+)", text)) for text in (plain, changed)]
    assert float(of[1]["gradients"]) == pytest.approx(float(of[0]["gradients"]) / 2, abs=0.1)
    assert float(of[1]["activations"]) > float(of[0]["activations"])


@pytest.mark.skipif(nemo.is_installed(), reason="NeMo is here")
def test_the_other_engine_is_missed_here(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture, much_room: None
) -> None:
    switches = ["--no-async_save", "--no-overlap_param_gather"]
    text = look(capsys, [*twelve_b(clips, tmp_path / "run"), "--engine", "nemo", *switches])
    assert "note: NeMo 2 is not installed here" in text


def test_the_optimizer_in_host_memory(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture, much_room: None
) -> None:
    words = [*twelve_b(clips, tmp_path / "run"), "--optimizer_cpu_offload"]
    text = look(capsys, words)
    model = look_at_source("nvidia/Cosmos-1.0-Autoregressive-12B").config
    work = Workload(model, 1, 64, offload_fraction=1.0)
    each = offloaded_bytes(work, Layout(4, data=16, sequence_parallel=True)) / 1e9
    assert f"--optimizer_cpu_offload: up to {each:.1f} GB of host memory a process" in text
    assert not re.search(r"GiB \(.*optimizer", text)
    assert re.search(r"GiB \(.*optimizer", look(capsys, words[:-1]))


def test_stages_and_slow_links(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture, much_room: None
) -> None:
    sizes = "--pipeline_model_parallel_size 2 --context_parallel_size 2 --gpus_per_node 4"
    text = look(capsys, twelve_b(clips, tmp_path / "run", *sizes.split()))
    assert "64 processes on 16 machines: TP 4, PP 2, CP 2, DP 4" in text
    assert "note: the context-parallel groups reach over machines of 4 GPUs" in text
    assert "32 pipeline-parallel groups of 2, the first of ranks 0, 32" in text
    assert "ranks 0 to 31: " in text and "ranks 32 to 63: " in text


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--num_gpus 6", "needs a multiple of 4 processes, but this is a dry run of 6"),
        ("--micro_batch_size 3", "--global_batch_size 64 is not a multiple of"),
        ("--gpu V100", "the memory of --gpu V100 is not known: give --gpu_memory_gb"),
        ("--gpu_memory_gb 40", r"a GPU would need 42.* of 40, 8% of which stay free"),
        ("--tensor_model_parallel_size 0", "--tensor_model_parallel_size 0 must be at least 1"),
        ("--tensor_model_parallel_size 16", "--tensor_model_parallel_size 16 does not divide"),
        ("--model_path no/such-model", "no/such-model is not in the Hugging Face cache"),
        ("--model_path random:5B-Video2World", "the model takes a text"),
        ("--sample_every_n_steps 10", "the tokenizer 'given' is named by the checkpoint"),
        (
            "--sample_every_n_steps 10 --sample_tokenizer_path tiny --sample_videos_dir /absent",
            "--sample_videos_dir /absent has no",
        ),
        ("--vocab_size 0", "--vocab_size 0 must be at least 1"),
    ],
)
def test_refusals(more: str, sentence: str, clips: Path, tmp_path: Path, much_room: None) -> None:
    words = [*twelve_b(clips, tmp_path / "run"), *more.split()]
    command: Any = parse(TrainCommand, FLAGS, words, "train", "")
    with pytest.raises(UserError, match=sentence) as caught:
        dry_run.show(command)
    assert caught.value.exit_code == 2 and list(tmp_path.iterdir()) == []


def test_too_small_a_disk(
    clips: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All is said first; what is kept counts."""
    monkeypatch.setattr("cosmos_posttrain.files.free_bytes", lambda folder: 400e9)
    command: Any = parse(TrainCommand, FLAGS, twelve_b(clips, tmp_path / "run"), "train", "")
    with pytest.raises(UserError, match=r"4 checkpoints of 161.854 GB would lie in .*keep fewer"):
        dry_run.show(command)
    assert "layout:" in capsys.readouterr().out
    look(capsys, twelve_b(clips, tmp_path / "run", "--keep_last_n", "1"))


def test_a_text(tmp_path: Path, capsys: pytest.CaptureFixture, much_room: None) -> None:
    prompts = write_full_size_prompts(tmp_path / "prompts", 4)
    config = REPOSITORY_DIR / "configs" / "train_13b_video2world.yaml"
    words = ["--config", str(config), "--data_path", str(prompts), "--num_gpus", "8"]
    words += ["--log_dir", str(tmp_path / "run")]
    assert "TP 4, PP 1, CP 2, DP 1" in look(capsys, words, takes_text=True)
    command: Any = parse(TrainCommand, FLAGS, words, "train", "")
    with pytest.raises(UserError, match=r"train on it with train_video2world\.py"):
        dry_run.show(command)


def test_a_run_that_has_begun(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It would go on; other data would be refused, as by the run itself. Nothing changes."""
    tokens, log_dir = write_data_set(tmp_path / "tokens", 2, 4), tmp_path / "run"
    words = f"""--data_path {tokens} --split_string 3,1,1 --model_path random:tiny
        --tensor_model_parallel_size 1 --log_dir {log_dir} --max_steps 5 --save_every_n_steps 2
        --global_batch_size 4""".split()
    train(make_config(tokens, log_dir, max_steps=2, save_every_n_steps=2))
    before = listing(tmp_path)
    text = look(capsys, words)
    checkpoint = log_dir / "default" / "checkpoints" / "epoch=1-step=1"
    assert f"goes on behind step 2 of {checkpoint}" in text
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    assert f"2 to be written, every 2 steps and at the end, {size / 1e9:,.3f} GB each" in text
    command: Any = parse(TrainCommand, FLAGS, [*words, "--seed", "5"], "train", "")
    with pytest.raises(UserError, match="was trained on other data"):
        dry_run.show(command)
    assert listing(tmp_path) == before


@pytest.mark.slow
def test_as_a_process(clips: Path, tmp_path: Path) -> None:
    """Exit codes, streams, and no lock, cache or GPU; under torchrun it is said once."""
    words = ["train_general.py", "--dry_run", "--data_path", clips, "--log_dir", tmp_path / "run"]
    model = ["--model_path", "nvidia/Cosmos-1.0-Autoregressive-4B", "--keep_last_n", "1"]
    sizes = ["--save_every_n_steps", "100000", "--gpu", "H200"]
    home = {"HF_HOME": str(tmp_path / "hub"), "CUDA_VISIBLE_DEVICES": ""}
    finished = run_script([*words, *model, *sizes], nproc=2, env=home)
    code = 0 if "keep fewer" not in finished.stderr else 1  # a small disk
    assert finished.returncode == code, finished.stderr
    assert finished.stdout.count("2 processes on 1 machine: TP 2") == 1
    finished = run_script([*words, *model, *sizes], env=home)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert "needs a multiple of 2 processes, but this is a dry run of 1" in finished.stderr
    assert os.listdir(tmp_path) == []
