"""Whole runs: the same curve at every layout, and after every kind of interruption."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.distributed_run import run_distributed, run_script
from helpers.run_case import losses, make_config, run
from helpers.script_here import run_here

from cosmos_posttrain.errors import ConfigError, OutputFolderError

pytestmark = pytest.mark.compat

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def reference_run(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps on one process, checkpoints after 10 and 20."""
    log_dir = tmp_path_factory.mktemp("reference") / "run"
    assert run(make_config(tokens, log_dir)) == "epoch=13-step=19"
    return log_dir


def largest_difference(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second)
    return max(abs(a - b) / a for a, b in zip(first, second, strict=True))


def test_run_learns_and_records(reference_run: Path) -> None:
    curve = losses(reference_run)
    assert len(curve) == 20
    assert sum(curve[-5:]) < 0.9 * sum(curve[:5])
    last = json.loads((reference_run / "default" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val_loss"] > 0
    assert last["consumed_samples"] == 80
    checkpoint = reference_run / "default" / "checkpoints" / "epoch=13-step=19"
    assert sorted(path.name for path in (checkpoint / "context").iterdir()) == [
        "config.yaml",
        "data.json",
        "metrics.json",
        "model.json",
        "state.json",
    ]
    assert list((reference_run / "default" / "tb_logs").glob("events.*"))
    launches = (reference_run / "default" / "launches.jsonl").read_text().splitlines()
    assert len(launches) == 1
    launched = json.loads(launches[0])
    assert launched["started"] and launched["environment"]["num_processes"] == 1
    assert {"command_line", "python", "torch"} <= set(launched["environment"])
    recorded = json.loads((checkpoint / "context" / "data.json").read_text())
    assert recorded["started_from"] == {"model_path": "random:tiny"}


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        {"parallel__tensor_model_parallel_size": 2},
        {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True},
        {},  # data parallel
    ],
    ids=["tp2", "tp2-sequence-parallel", "dp2"],
)
def test_same_curve_at_every_layout(
    tokens: Path, reference_run: Path, tmp_path: Path, layout: dict
) -> None:
    config = make_config(tokens, tmp_path / "run", **layout)
    run_distributed(run, 2, config)
    # Sums are taken in another order; after 20 steps of float32 that is far below 1e-4.
    assert largest_difference(losses(reference_run), losses(tmp_path / "run")) <= 1e-5


@pytest.mark.distributed
def test_pipeline_parallel_gives_the_same_curve(
    tokens: Path, reference_run: Path, tmp_path: Path
) -> None:
    """From a checkpoint, since fresh weights of later stages are drawn from other seeds."""
    settings = {"model__path": str(reference_run), "max_steps": 5}
    run(make_config(tokens, tmp_path / "one", **settings))
    config = make_config(tokens, tmp_path / "two", **settings)
    config.parallel.pipeline_model_parallel_size = 2
    run_distributed(run, 2, config)
    assert largest_difference(losses(tmp_path / "one"), losses(tmp_path / "two")) <= 1e-5


def resumable_copy(reference_run: Path, target: Path) -> Path:
    """The reference run as if it had been killed at step 15: metrics go on, a save is half-done."""
    shutil.copytree(reference_run, target)
    checkpoints = target / "default" / "checkpoints"
    last = next(checkpoints.glob("*step=19"))
    last.rename(last.with_name(f".tmp-0-{last.name}"))
    metrics = target / "default" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(lines[:15]) + '\n{"step": 15, "reduced')
    return target


def test_resume_equals_uninterrupted(tokens: Path, reference_run: Path, tmp_path: Path) -> None:
    log_dir = resumable_copy(reference_run, tmp_path / "run")
    run(make_config(tokens, log_dir))
    assert largest_difference(losses(reference_run), losses(log_dir)) <= 1e-6
    assert not list((log_dir / "default" / "checkpoints").glob(".*"))


@pytest.mark.distributed
def test_resume_at_other_layouts(tokens: Path, reference_run: Path, tmp_path: Path) -> None:
    """Weights and optimizer go from one process to TP 2, and from there to DP 2."""
    log_dir = resumable_copy(reference_run, tmp_path / "run")
    config = make_config(tokens, log_dir, max_steps=20, save_every_n_steps=5)
    config.parallel.tensor_model_parallel_size = 2
    run_distributed(run, 2, config)
    assert largest_difference(losses(reference_run), losses(log_dir)) <= 1e-5
    shutil.rmtree(next((log_dir / "default" / "checkpoints").glob("*step=19")))
    config.parallel.tensor_model_parallel_size = 1
    run_distributed(run, 2, config)
    assert largest_difference(losses(reference_run), losses(log_dir)) <= 1e-5


def test_killed_run_goes_on_with_the_same_command(
    tokens: Path, reference_run: Path, tmp_path: Path
) -> None:
    log_dir = tmp_path / "run"
    command = [sys.executable, "train_general.py", "--data_path", str(tokens)]
    command += ["--model_path", "random:tiny", "--log_dir", str(log_dir), "--lr", "1e-3"]
    command += ["--split_string", "3,1,1", "--tensor_model_parallel_size", "1"]
    command += ["--max_steps", "20", "--save_every_n_steps", "10", "--global_batch_size", "4"]
    command += ["--num_threads", "1"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list((log_dir / "default" / "checkpoints").glob("*step=9")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((log_dir / "default" / "checkpoints").glob("*step=19"))
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL, timeout=300)
    assert largest_difference(losses(reference_run), losses(log_dir)) <= 1e-6


@pytest.mark.parametrize(
    "settings",
    [{"model__recompute": True}, {"model__recompute_modules": "mlp"}],
    ids=["all", "mlp"],
)
def test_recompute_changes_nothing(
    tokens: Path, reference_run: Path, tmp_path: Path, settings: dict
) -> None:
    run(make_config(tokens, tmp_path / "run", **settings, max_steps=3))
    run(make_config(tokens, tmp_path / "plain", max_steps=3))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    # A shorter run has another schedule: only the first loss is comparable.
    assert losses(tmp_path / "run")[0] == losses(reference_run)[0]


def test_post_training_starts_from_the_weights(
    tokens: Path, reference_run: Path, tmp_path: Path
) -> None:
    """A run from another run's checkpoint starts where that one ended, with a fresh optimizer."""
    run(make_config(tokens, tmp_path / "run", model__path=str(reference_run), max_steps=2))
    assert losses(tmp_path / "run")[0] < 0.8 * losses(reference_run)[0]
    assert losses(tmp_path / "run")[0] != losses(reference_run)[0]


def test_complete_run_is_left_alone(
    tokens: Path, reference_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (reference_run / "default" / "metrics.jsonl").read_bytes()
    assert run(make_config(tokens, reference_run)) == "epoch=13-step=19"
    assert "nothing to do" in capsys.readouterr().out
    assert (reference_run / "default" / "metrics.jsonl").read_bytes() == before


def test_resuming_on_other_data_is_refused(tokens: Path, reference_run: Path) -> None:
    with pytest.raises(ConfigError, match="trained on other data"):
        run(make_config(tokens, reference_run, data__split_string="2,2,1"))


def test_foreign_log_dir_is_refused(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputFolderError, match="something else than a run"):
        run(make_config(tokens, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def bad_usage(tokens: Path, tmp_path: Path) -> list[str]:
    base = ["--data_path", str(tokens), "--log_dir", str(tmp_path / "run")]
    return [*base, "--model_path", "random:tiny", "--tensor_model_parallel_size", "1"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data_path", "/no/such/folder"], "/no/such/folder"),
        (["--tensor_model_parallel_size", "3"], "use one of 1, 2"),
        (
            ["--tensor_model_parallel_size", "3", "--dry_run", "--num_gpus", "3"],
            "use one of 1, 2",
        ),
        (["--lr", "-1"], "--lr -1.0 must be above 0"),
        (["--model_path", "/no/such/model"], "/no/such/model does not exist"),
        (["--no_such_flag", "1"], "--no_such_flag"),
    ],
)
def test_bad_usage_is_one_sentence(
    tokens: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    command = [*bad_usage(tokens, tmp_path), *arguments]
    code, said = run_here("train_general.py", command, monkeypatch, capsys)
    assert code == 2
    assert sentence in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_process_ends_with_one_sentence(tokens: Path, tmp_path: Path) -> None:
    command = ["train_general.py", *bad_usage(tokens, tmp_path)]
    result = run_script([*command, "--tensor_model_parallel_size", "2"])
    assert result.returncode == 2, result.stderr
    assert "torchrun --nproc-per-node=2" in result.stderr
    lines = result.stderr.strip().splitlines()
    # Older torch for CUDA prints this past all filters where there is nvcc but no device.
    assert len([line for line in lines if "No CUDA runtime is found" not in line]) == 1, lines
    assert not (tmp_path / "run").exists()
