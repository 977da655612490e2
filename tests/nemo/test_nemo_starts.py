"""What ``--engine nemo`` begins with: checkpoints of both engines, and where it was started."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.distributed_run import REPOSITORY_DIR
from helpers.fake_slurm import FakeSlurm
from helpers.nemo_case import NEEDS_NEMO, Train, finish, watched, words_of
from helpers.run_case import losses

from cosmos_posttrain.checkpoint.context import list_checkpoints

pytestmark = NEEDS_NEMO

# bfloat16 keeps 8 bits, and the engines round gradients in another order.
CLOSE_IN_BFLOAT16 = 1e-2

SAYS_WHAT_NEMO_READS = """
from nemo.lightning import MegatronStrategy

restore = MegatronStrategy.selective_restore

def say_and_restore(self):
    if self.restore_config:
        print("NeMo reads", self.restore_config.path)
    restore(self)

MegatronStrategy.selective_restore = say_and_restore
"""


def test_nemo_reads_what_its_engine_or_a_conversion_wrote(
    data: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    """In bfloat16, where the optimizer's own copies of the weights must follow them."""
    own = list_checkpoints(train("nemo", 2))[0]
    converted = tmp_path / "start"
    words = ["convert_checkpoint.py", "--source", own, "--target", converted]
    finish([*words, "--target_format", "nemo"])
    for engine, start in (("direct", own), ("nemo", own), ("converted", converted)):
        log_dir = tmp_path / engine
        words = words_of(data, "base", log_dir, "direct" if engine == "direct" else "nemo", 1)
        words += ["--model_path", start, "--dtype", "bfloat16", "--max_steps", 3]
        said = finish(watched(tmp_path / "program", SAYS_WHAT_NEMO_READS, words))
        assert said.count(f"NeMo reads {start}\n") == (engine != "direct"), said
        curve, expected = losses(log_dir), losses(tmp_path / "direct")
        assert curve[0] == pytest.approx(expected[0], rel=1e-6)
        assert curve == pytest.approx(expected, rel=CLOSE_IN_BFLOAT16)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


@pytest.mark.parametrize(
    ("writer", "damage", "sentence"),
    [
        ("direct", cut, "restore the checkpoint"),
        ("nemo", cut, "is truncated: it has"),
        ("nemo", fill, "cannot be read by NeMo ("),
    ],
    ids=["direct-truncated", "nemo-truncated", "nemo-other_bytes"],
)
def test_a_damaged_checkpoint_is_one_sentence_and_leaves_nothing(
    writer: str,
    damage: Callable[[Path], None],
    sentence: str,
    data: dict[str, Path],
    train: Train,
    tmp_path: Path,
) -> None:
    start, log_dir = tmp_path / "start", tmp_path / "run"
    shutil.copytree(list_checkpoints(train(writer, 2))[0], start)
    for path in (start / "weights").glob("*.distcp"):
        damage(path)
    words = words_of(data, "base", log_dir, "nemo", 1)
    said = finish([*words, "--model_path", start], code=2)
    (line,) = (line for line in said.splitlines() if line.lower().startswith("error"))
    assert line.startswith("error: ") and sentence in line, said
    assert "Traceback" not in said
    assert not log_dir.exists()


SAYS_ITS_THREADS = """
os.environ.pop("OMP_NUM_THREADS")
import torch
from cosmos_posttrain.nemo.trainer import NemoTrainer

before = NemoTrainer.before_step

def say_and_begin(self):
    print("threads:", torch.get_num_threads())
    before(self)

NemoTrainer.before_step = say_and_begin
"""


def test_plain_python_in_an_allocation_of_slurms(data: dict[str, Path], tmp_path: Path) -> None:
    """One process, not started by srun, with the number of threads that was asked for."""
    num_threads = (os.cpu_count() or 1) + 1  # not what Lightning would take
    words = words_of(data, "base", tmp_path / "run", "nemo", 1)
    words += ["--max_steps", 2, "--num_threads", num_threads]
    allocation = {"NTASKS": "8", "NTASKS_PER_NODE": "8", "NNODES": "2", "JOB_NAME": "train"}
    allocation |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    said = finish(
        watched(tmp_path / "program", SAYS_ITS_THREADS, words),
        env={f"SLURM_{name}": value for name, value in allocation.items()},
    )
    assert said.count(f"threads: {num_threads}\n") == said.count("threads: ") == 2
    assert len(losses(tmp_path / "run")) == 2


def test_two_nodes_of_slurms(data: dict[str, Path], tmp_path: Path) -> None:
    """By the sbatch file: one process on each."""
    words = words_of(data, "base", tmp_path / "run", "nemo", 2)
    recipe = REPOSITORY_DIR / "recipes" / "slurm" / "train.sbatch"
    finished = subprocess.run(
        ["bash", str(recipe), *map(str, words), "--max_steps", "2"],
        cwd=REPOSITORY_DIR,
        env=FakeSlurm(tmp_path, 2, num_nodes=2).environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert len(losses(tmp_path / "run")) == 2


def test_mixed_settings_against_the_direct_engine(
    data: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    """bfloat16, sequence parallelism, activations computed again, new rows for new tokens."""
    start = list_checkpoints(train("direct", 2))[0]
    for engine in ("direct", "nemo"):
        words = words_of(data, "base", tmp_path / engine, engine, 2)
        words += ["--dtype", "bfloat16", "--sequence_parallel", "--recompute", "--max_steps", 6]
        words += ["--model_path", start, "--embedding_init", "reset", "--freeze_body_steps", 2]
        finish(words, 2)
    curves = [losses(tmp_path / engine) for engine in ("direct", "nemo")]
    assert curves[1][0] == pytest.approx(curves[0][0], rel=1e-6)
    assert curves[1] == pytest.approx(curves[0], rel=CLOSE_IN_BFLOAT16)
    assert curves[0][-1] < 0.98 * curves[0][0]  # they have learnt something to differ in
