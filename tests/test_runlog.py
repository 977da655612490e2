"""What a long job says: a progress line now and then, and rows that are JSON, once each."""

from __future__ import annotations

import fcntl
import io
import json
import math
import os
import re
import struct
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TextIO

import pytest
from helpers.distributed_run import free_port, run_script

from cosmos_posttrain import launch, runlog
from cosmos_posttrain.errors import ConfigError, SaveError
from cosmos_posttrain.runlog import ProgressDisplay, RunLog, duration, read_rows, start_wandb


@dataclass
class Settings:
    """Of a run.

    Attributes:
        lr: learning rate.
    """

    lr: float = 0.1


# Progress.


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end() -> None:
    stream = io.StringIO()
    progress = ProgressDisplay(2000, "steps", "old", stream=stream, log_seconds=0.1)
    start = time.monotonic()
    for number in range(2000):
        progress.advance(f"loss {number}")
        time.sleep(0.0001)
    lines = stream.getvalue().splitlines()
    assert 1 <= len(lines) <= 1 + (time.monotonic() - start) / 0.1
    assert re.fullmatch(
        r"old: 2,000/2,000 steps, loss 1999, [\d,.]+ steps/s, 0:0\d in all", lines[-1]
    )
    assert "\r" not in stream.getvalue()


def test_the_default_pause_of_a_log_is_seconds_long() -> None:
    """One line per step was 720 lines of a quickstart."""
    stream = io.StringIO()
    progress = ProgressDisplay(1000, "steps", stream=stream)
    for _ in range(999):
        progress.advance()
    assert stream.getvalue() == ""
    progress.show(999, "val loss 1.0", force=True)
    assert stream.getvalue().startswith("999/1,000 steps, val loss 1.0, ")


def test_time_left_counts_what_this_process_has_done() -> None:
    progress = ProgressDisplay(100, "steps", done=90, stream=io.StringIO())
    progress.show(90, force=True)
    assert "left" not in progress._stream.getvalue() and progress.rate == 0
    time.sleep(0.1)
    progress.advance(count=5)
    assert 0 < progress.rate < 50  # 5 in at least 0.1 s
    assert progress.seconds_left == pytest.approx(5 / progress.rate, rel=0.1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (-3, "0:00"), (61.4, "1:01"), (3600, "1:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.fixture
def terminal() -> Iterator[tuple[TextIO, int]]:
    """A terminal of 40 columns: its writing end, and the descriptor where it can be read."""
    reading, writing = os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    with os.fdopen(writing, "w") as stream:
        yield stream, reading
    os.close(reading)


def test_a_terminal_has_one_line_that_is_rewritten(
    terminal: tuple[TextIO, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, reading = terminal
    monkeypatch.setattr(runlog, "_TERMINAL_SECONDS", 0.0)
    monkeypatch.setattr(sys, "stdout", stream)
    progress = ProgressDisplay(3, "steps", stream=stream)
    progress.advance("a note that is too long for this terminal")
    progress.advance()
    launch.say("saved")
    progress.advance()
    launch.say("done")
    said = ""
    while not said.endswith("done\r\n"):
        said += os.read(reading, 10_000).decode()
    assert len(re.findall(r"\r([^\r\n]*)\x1b\[K", said)[0]) == 39
    # What is said begins a line of its own, and the last progress line ends with one.
    assert re.search(r"2/3 steps, [^\r\n]*\x1b\[K\r\nsaved\r\n\r3/3 steps", said)
    assert re.search(r"in all\x1b\[K\r\ndone\r\n$", said)


def test_other_ranks_show_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_group", lambda: None)  # which an earlier test may have made
    monkeypatch.setenv("RANK", "1")
    stream = io.StringIO()
    ProgressDisplay(1, "steps", stream=stream).advance()
    assert stream.getvalue() == ""


# Rows.


def strictly(text: str) -> list[dict[str, Any]]:
    """Rows as a reader has them that knows no NaN and no Infinity."""
    refuse = pytest.fail
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_metrics_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    log = RunLog(tmp_path, Settings(), 0)
    log.write({"step": 0, "loss": math.inf, "norm": -math.inf, "nested": [math.nan]})
    log.write({"step": 1, "loss": math.nan, "absent": None})
    log.close()
    assert strictly((tmp_path / "metrics.jsonl").read_text()) == [
        {"step": 0, "loss": None, "norm": None, "nested": [None]},
        {"step": 1, "loss": None, "absent": None},
    ]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    log = RunLog(tmp_path, Settings(), 0)
    assert log.last_step is None
    for step in range(4):
        log.write({"step": step, "loss": 1 / (step + 1)})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + "[1]\n" + '{"loss": 3}\n' + '{"step": 4, "lo')
    log = RunLog(tmp_path, Settings(), 3)
    assert log.last_step == 2
    log.write({"step": 3, "loss": 0.0})
    log.close()
    rows = strictly(path.read_text())
    assert rows == read_rows(path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["loss"] for row in rows] == [1, 1 / 2, 1 / 3, 0]


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_group", lambda: None)  # which an earlier test may have made
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    log = RunLog(tmp_path, Settings(), 0)
    log.write({"step": 0})
    log.close()
    assert list(tmp_path.iterdir()) == []


# W&B.


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"WANDB_API_KEY": "key"}, True),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_MODE": "disabled"}, False),
        ({"WANDB_MODE": "Disabled", "WANDB_API_KEY": "key"}, False),
    ],
)
def test_the_environment_decides_and_an_absent_wandb_is_refused_only_where_it_is_wanted(
    variables: dict[str, str], wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runlog, "find_spec", lambda name: object())
    assert runlog.wants_wandb() is wanted
    monkeypatch.setattr(runlog, "find_spec", lambda name: None)
    if wanted:
        with pytest.raises(ConfigError, match="wandb is not installed"):
            runlog.wants_wandb()
        return
    RunLog(tmp_path, Settings(), 0).close()
    assert not (tmp_path / "wandb_id.txt").exists()


def test_a_run_is_named_after_its_folder_and_keeps_its_curves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, Any]] = []
    wandb = ModuleType("wandb")
    wandb.init = lambda **values: started.append(values) or SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(runlog, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_MODE", "offline")
    for folder in ("a/run/default", "a/tokenizer", "a/tokenizer"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        start_wandb(Settings(), tmp_path / folder)
    monkeypatch.chdir(tmp_path / "a" / "run")
    start_wandb(Settings(), Path("default"))
    assert [values["name"] for values in started] == ["run", "tokenizer", "tokenizer", "run"]
    ids = [values["id"] for values in started]
    assert ids[1] == ids[2] != ids[0] == ids[3]
    assert started[0]["config"] == {"lr": 0.1}


# Goes on from a run that W&B knows, as far as its folder says.
WITHOUT_NETWORK = """
import sys
from dataclasses import dataclass
from pathlib import Path
from cosmos_posttrain.runlog import RunLog

@dataclass
class Settings:
    lr: float = 0.1

log = RunLog(Path(sys.argv[1]), Settings(), 0)
log.write({"step": 0, "loss": 1.0})
log.close()
"""


def test_where_wandb_cannot_be_reached_the_run_is_recorded_offline(tmp_path: Path) -> None:
    environment = {
        "WANDB_API_KEY": "a" * 40,
        "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}",
        "WANDB_INIT_TIMEOUT": "2",
        "WANDB_SILENT": "true",
        "WANDB_MODE": "online",
    }
    finished = run_script(["-c", WITHOUT_NETWORK, tmp_path], env=environment)
    assert finished.returncode == 0, finished.stderr
    (warning,) = [line for line in finished.stderr.splitlines() if "W&B" in line]
    assert warning.startswith("warning: W&B did not take the run")
    assert "wandb sync sends it" in warning and "Traceback" not in finished.stderr
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1.0]


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    log = RunLog(tmp_path, Settings(), 0)
    log.write({"step": 0, "loss": 1.0})
    log._file.close()
    with Path("/dev/full").open("w", encoding="utf-8") as log._file:
        with pytest.raises(SaveError, match=r"/dev/full cannot be written \(No space left"):
            log.write({"step": 1, "loss": 1.0})
        log.close()


def test_tensorboard_without_room_ends_its_curves_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def no_room(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    log = RunLog(tmp_path, Settings(), 0)
    monkeypatch.setattr(log._tensorboard, "add_scalar", no_room)
    for step in range(3):
        log.write({"step": step, "loss": 1.0})
    log._tensorboard.close()
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().err.count("nothing more for TensorBoard") == 1
