"""The plain sbatch file: read, and run on one machine with stand-ins for srun and scontrol."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.distributed_run import REPOSITORY_DIR, kill_tree
from helpers.fake_slurm import FakeSlurm, directives
from helpers.prepared import write_data_set
from helpers.run_case import losses

RECIPE = REPOSITORY_DIR / "recipes" / "slurm" / "train.sbatch"


def command(tokens: Path, log_dir: Path, steps: int) -> list[str]:
    arguments = f"""train_general.py --data_path {tokens} --model_path random:tiny
        --log_dir {log_dir} --tensor_model_parallel_size 2 --split_string 1,0,0 --num_threads 1
        --max_steps {steps} --save_every_n_steps {steps} --global_batch_size 2"""
    return ["bash", str(RECIPE), *arguments.split()]


def test_it_is_bash_and_says_what_slurm_is_to_know() -> None:
    subprocess.run(["bash", "-n", str(RECIPE)], check=True)
    options = directives(RECIPE.read_text())
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert options["signal"] == "B:USR1@300" and "requeue" in options


@pytest.mark.parametrize(
    ("words", "sentence"),
    [([], "name the training script"), (["train_all.py"], "there is no train_all.py in")],
)
def test_refusals(words: list[str], sentence: str, tmp_path: Path) -> None:
    environment = FakeSlurm(tmp_path, 2).environment()
    finished = subprocess.run(
        ["bash", str(RECIPE), *words], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 2 and sentence in finished.stderr


def test_a_container(tmp_path: Path) -> None:
    """What srun is given; here it only says so."""
    slurm = FakeSlurm(tmp_path, 2)
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    environment = {
        **slurm.environment(),
        "CONTAINER": "a b.sqsh",
        "CONTAINER_MOUNTS": "/d:/d,/r:/r",
    }
    finished = subprocess.run(
        ["bash", str(RECIPE), "train_general.py", "--log_dir", "/r/x y"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    words = finished.stdout.splitlines()
    assert words[:5] == [
        "--kill-on-bad-exit=0",
        "--wait=60",
        "--container-image=a b.sqsh",
        "--container-workdir=/workspace/cosmos_posttrain",
        "--container-mounts=/d:/d,/r:/r",
    ]
    assert words[-4:] == ["train", "train_general.py", "--log_dir", "/r/x y"]


@pytest.mark.slow
def test_a_failing_run_is_not_queued_again(tmp_path: Path) -> None:
    """Bad input: the run's own sentence and exit code, once."""
    slurm = FakeSlurm(tmp_path, 2)
    finished = subprocess.run(
        command(tmp_path / "absent", tmp_path / "run", 2),
        cwd=REPOSITORY_DIR,
        env=slurm.environment(),
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2, finished.stderr
    assert finished.stderr.count("does not exist") == 1, finished.stderr
    assert finished.stderr.count("error") == 1 and "error: " in finished.stderr
    assert slurm.asked == []


# Saves when it is asked, ends with 1 as a stopped run does; rank 0 ends later than the others.
STOPPING = """
import os, signal, sys, time
from pathlib import Path

folder, rank, asked = Path(sys.argv[1]), os.environ["RANK"], []
signal.signal(signal.SIGUSR1, lambda number, _: asked.append(number))
(folder / f"began {rank}").touch()
end = time.monotonic() + 60
while not asked and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.5 if rank == "0" else 0)
(folder / f"saved {rank}").touch()
sys.exit(1)
"""


@pytest.mark.parametrize(
    ("number", "code", "asked"),
    [(signal.SIGUSR1, 0, ["requeue 4711"]), (signal.SIGTERM, 1, [])],
)
def test_signals(number: signal.Signals, code: int, asked: list[str], tmp_path: Path) -> None:
    """Of the time limit and of a preemption, after which Slurm itself queues again."""
    slurm, script = FakeSlurm(tmp_path / "slurm", 2), tmp_path / "stopping.py"
    script.write_text(STOPPING)
    words = ["bash", str(RECIPE), str(script), str(tmp_path)]
    with subprocess.Popen(words, env=slurm.environment()) as job:
        try:
            while len(list(tmp_path.glob("began *"))) < 2:
                assert job.poll() is None
                time.sleep(0.05)
            job.send_signal(number)
            assert job.wait(timeout=60) == code
        finally:
            kill_tree(job.pid)
    assert {path.name for path in tmp_path.glob("saved *")} == {"saved 0", "saved 1"}
    assert slurm.asked == asked


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_the_time_limit_meets(tmp_path: Path) -> None:
    """Two processes: signalled, saved, queued again, gone on with to the end."""
    tokens, log_dir, steps = write_data_set(tmp_path / "tokens", 2, 4), tmp_path / "run", 40
    slurm = FakeSlurm(tmp_path / "slurm", 2)
    words, metrics = command(tokens, log_dir, steps), log_dir / "default" / "metrics.jsonl"
    output = tmp_path / "output.txt"
    for attempt in (1, 2):
        with (
            output.open("a") as stream,
            subprocess.Popen(
                words, cwd=REPOSITORY_DIR, env=slurm.environment(), stdout=stream, stderr=stream
            ) as job,
        ):
            try:
                while attempt == 1 and (not metrics.is_file() or len(losses(log_dir)) < 3):
                    assert job.poll() is None, output.read_text()
                    time.sleep(0.05)
                if attempt == 1:  # as --signal=B:USR1@300 does
                    job.send_signal(signal.SIGUSR1)
                assert job.wait(timeout=240) == 0, output.read_text()
            finally:
                kill_tree(job.pid)
        if attempt == 1:
            assert slurm.asked == ["requeue 4711"]
            assert "stopped by SIGUSR1 after" in output.read_text()
            done = len(losses(log_dir))
            assert 3 <= done < steps
            assert list((log_dir / "default" / "checkpoints").glob(f"*step={done - 1}"))
    assert len(losses(log_dir)) == steps and slurm.asked == ["requeue 4711"]
    assert "resuming" in output.read_text()
