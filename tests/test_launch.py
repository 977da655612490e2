"""This process among those that were launched: its device, what it says, how it ends."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR, free_port, kill_tree, run_script

from cosmos_posttrain import launch
from cosmos_posttrain.errors import ConfigError, PartialFailureError
from cosmos_posttrain.launch import StopSignal

# Its first argument says what goes wrong.
FAILING = """
import sys, time
import torch
from cosmos_posttrain import launch
from cosmos_posttrain.errors import ConfigError, PartialFailureError

def main():
    launch.say("hello")
    if sys.argv[1] == "all":
        time.sleep(0 if launch.rank() else 0.5)
        raise ConfigError("this does not fit.")
    if launch.rank() == 1:
        raise PartialFailureError("this went wrong.")
    time.sleep(60)

launch.run_cli(main)
"""

# Leaves its number and a forked helper's in the folder that is its argument, and waits.
WAITING = """
import os, sys, time
from pathlib import Path
from cosmos_posttrain import launch

def main():
    helper = os.fork()
    if helper:
        Path(sys.argv[1], str(os.getpid())).touch()
        Path(sys.argv[1], str(helper)).touch()
    time.sleep(120)

launch.run_cli(main)
"""


def script(folder: Path, code: str) -> Path:
    (folder / "script.py").write_text(code)
    return folder / "script.py"


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not condition():
        time.sleep(0.02)
    return condition()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# The device: the one place where torch.cuda is imitated, because no test machine has two GPUs.


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def show(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return show


def test_each_process_of_a_machine_has_a_gpu_of_its_own(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(2)
    for local_rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        for requested in ("auto", "cuda", torch.device("cuda")):
            assert launch.device(requested) == torch.device("cuda", local_rank)
    assert launch.device("cuda:0") == torch.device("cuda", 0)
    assert launch.device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    for requested in ("auto", "cuda"):
        with pytest.raises(ConfigError, match=r"shows 2 GPU\(s\), too few for process 3 on it"):
            launch.device(requested)
    assert launch.device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"device cuda:2 was asked for, .* shows 2 GPU\(s\)"):
        launch.device("cuda:2")


def test_without_a_gpu_auto_is_the_cpu(
    gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert launch.device() == torch.device("cpu")
    for requested in ("cuda", "cuda:0"):
        with pytest.raises(ConfigError, match="CUDA is absent; use cpu"):
            launch.device(requested)


def picks_a_gpu_or_reads_the_launcher(source: str) -> bool:
    """``x.to("cuda")``, ``device="cuda"``, ``x.cuda()``, or the name of a launcher's variable."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and node.value in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            return True
        if isinstance(node, ast.Call):
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            words = [value.value for value in values if isinstance(value, ast.Constant)]
            if any(str(word).startswith("cuda") for word in words):
                return True
            if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
                return True
    return False


@pytest.mark.parametrize(
    "source", ['x.to("cuda")', 'f(device="cuda:1")', "x.cuda()", 'os.environ["LOCAL_RANK"]']
)
def test_a_second_rule_for_the_device_is_found(source: str) -> None:
    assert picks_a_gpu_or_reads_the_launcher(source)
    assert not picks_a_gpu_or_reads_the_launcher('x.device.type == "cuda"')


def test_there_is_one_rule_for_ranks_and_devices() -> None:
    package = Path(launch.__file__).parent
    # Megatron's own calls name CUDA, and become the CPU's there.
    allowed = {package / "launch.py", package / "distributed" / "cpu_device.py"}
    found = {
        path
        for path in package.rglob("*.py")
        if picks_a_gpu_or_reads_the_launcher(path.read_text())
    }
    assert found - allowed == set()


@pytest.mark.parametrize("requested", ["tpu", "", "cuda:x", "mps", "cuda:-1"])
def test_what_is_no_device_is_one_sentence(requested: str) -> None:
    with pytest.raises(ConfigError, match="auto, cpu, cuda") as caught:
        launch.device(requested)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_a_second_process_on_a_machine_with_one_gpu_is_refused() -> None:
    if torch.cuda.device_count() != 1:
        pytest.skip("needs a machine with one GPU")
    code = "from cosmos_posttrain import launch; launch.run_cli(lambda: launch.device() and None)"
    for local_rank, returncode in (("0", 0), ("1", 2)):
        finished = run_script(["-c", code], env={"LOCAL_RANK": local_rank})
        assert finished.returncode == returncode, finished.stderr
    assert "too few for process 2 on it (LOCAL_RANK 1)" in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_dtypes() -> None:
    assert launch.parse_dtype(None) is None
    assert launch.parse_dtype("bfloat16") == launch.parse_dtype(torch.bfloat16) == torch.bfloat16
    for name in ("int8", "Tensor", "", torch.int64):
        with pytest.raises(ConfigError, match="bfloat16, float16, float32"):
            launch.parse_dtype(name)


# What is said.


def run_and_exit(main: Callable[[], int | None]) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        launch.run_cli(main)
    return caught.value.code


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> None:
        raise error

    assert run_and_exit(lambda: None) == 0 and run_and_exit(lambda: 3) == 3
    assert run_and_exit(lambda: fail(ConfigError("a."))) == 2
    assert run_and_exit(lambda: fail(PartialFailureError("b."))) == 1
    assert run_and_exit(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: a.\nerror: b.\n"


def test_other_ranks_are_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launch.say("one")
    launch.say("two", error=True)
    monkeypatch.setattr(launch, "_group", lambda: None)  # which an earlier test may have made
    monkeypatch.setenv("RANK", "1")
    launch.say("three")
    assert tuple(capsys.readouterr()) == ("one\n", "two\n")


@pytest.mark.distributed
def test_an_error_of_all_ranks_is_printed_once_by_the_first(tmp_path: Path) -> None:
    finished = run_script([script(tmp_path, FAILING), "all"], nproc=2)
    assert finished.returncode == 1
    assert finished.stderr.count("this does not fit.") == 1, finished.stderr
    assert "error: this does not fit." in finished.stderr
    assert finished.stdout == "hello\n"


@pytest.mark.distributed
def test_an_error_of_another_rank_is_printed_with_its_number(tmp_path: Path) -> None:
    finished = run_script([script(tmp_path, FAILING), "one"], nproc=2)
    assert finished.returncode == 1
    assert finished.stderr.count("this went wrong.") == 1, finished.stderr
    assert "error on rank 1: this went wrong." in finished.stderr


def test_without_a_store_to_meet_at_the_error_is_printed(tmp_path: Path) -> None:
    """As where processes are started without torchrun, and the first is gone or not there yet."""
    env = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    env["MASTER_PORT"] = str(free_port())
    finished = run_script([script(tmp_path, FAILING), "one"], env=env)
    assert finished.returncode == 1
    assert finished.stderr == "error on rank 1: this went wrong.\n"


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["all", "one"])
def test_errors_without_a_launcher(kind: str, tmp_path: Path) -> None:
    """As under srun: once for all, and not lost where it is one rank's alone."""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(script(tmp_path, FAILING)), kind]
    said = [tmp_path / "said 0", tmp_path / "said 1"]
    processes = []
    for number in range(2):
        rank = {"RANK": str(number), "PYTHONPATH": str(REPOSITORY_DIR)}
        with said[number].open("w") as stream:
            processes.append(
                subprocess.Popen(command, env={**os.environ, **env, **rank}, stderr=stream)
            )
    try:
        assert processes[1].wait(timeout=60) == (2 if kind == "all" else 1)
        if kind == "all":
            assert processes[0].wait(timeout=60) == 2
            assert said[0].read_text() == "error: this does not fit.\n"
            assert said[1].read_text() == ""
        else:
            assert said[1].read_text() == "error on rank 1: this went wrong.\n"
    finally:
        for process in processes:
            kill_tree(process.pid)
            process.wait()


# The end.


@pytest.mark.distributed
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's part is Linux's")
def test_workers_and_their_helpers_end_with_a_killed_launcher(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(script(tmp_path, WAITING)), str(pids)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            assert wait_for(lambda: len(os.listdir(pids)) == 4)
            started = [int(name) for name in os.listdir(pids)]
            assert all(map(is_alive, started))
            process.send_signal(signal.SIGKILL)
            assert wait_for(lambda: not any(map(is_alive, started)), seconds=5)
        finally:
            kill_tree(process.pid)
            for pid in map(int, os.listdir(pids)):
                kill_tree(pid)


def test_a_plain_process_outlives_the_shell_that_started_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    command = f"{sys.executable} {script(tmp_path, WAITING)} {pids} & wait"
    with subprocess.Popen(["sh", "-c", command]) as shell:
        try:
            assert wait_for(lambda: len(os.listdir(pids)) == 2)
            shell.send_signal(signal.SIGKILL)
            shell.wait()
            time.sleep(0.5)
            assert all(is_alive(int(name)) for name in os.listdir(pids))
        finally:
            kill_tree(shell.pid)
            for pid in map(int, os.listdir(pids)):
                kill_tree(pid)


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    found = StopSignal()
    yield found
    found.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_is_noted_and_the_former_handler_comes_back(
    stop: StopSignal, number: signal.Signals
) -> None:
    assert stop.requested is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)  # the launcher passes on what came to all
    assert stop.requested == number.name
    stop.close()
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_forked_helper_dies_of_the_signal(stop: StopSignal) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"!")
        time.sleep(60)
        os._exit(0)
    assert os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM and stop.requested is None


def test_outside_the_main_thread_no_signal_is_noted() -> None:
    made: list[StopSignal] = []
    thread = threading.Thread(target=lambda: made.append(StopSignal()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    made[0].close()
