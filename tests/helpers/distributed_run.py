"""Runs a function in several processes over gloo, or one of the root scripts, from a test.

Flows in: a top-level function and its arguments, or a script's command line. Flows out: what each
rank returned, or the finished process. Nothing outlives its timeout, and no port is fixed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

REPOSITORY_DIR = Path(__file__).resolve().parents[2]

# Other ranks get this long to finish by themselves after one has failed.
GRACE_SECONDS = 3.0


class DistributedTestError(AssertionError):
    """A rank raised, died, or did not finish in time; the message holds its traceback."""


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_seconds: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Calls ``function(*args)`` in ``world_size`` processes, as torchrun would start them.

    RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set; the function makes its own
    process groups. It must be importable (defined at a module's top level), and its arguments and
    results must be picklable (CPU tensors are).

    Args:
        function: called once in each process.
        world_size: number of processes.
        *args: the same for every rank.
        timeout_seconds: for the whole call; everything is killed after it.
        env: further environment variables of the processes.

    Returns:
        What each rank returned, by rank.

    Raises:
        DistributedTestError: with the traceback of the first rank that failed, or the ranks that
            were still running when the time was over.
    """
    context = _multiprocessing_context()
    folder = Path(tempfile.mkdtemp(prefix="distributed-run-"))
    variables = {
        **os.environ,
        **(env or {}),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    # Plain pickle: torch would otherwise pass tensors through shared memory, as file descriptors.
    call = pickle.dumps((function, args))
    processes = [
        context.Process(target=_run_rank, args=(rank, call, variables, str(folder)))
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            process.start()
        unfinished = _join(processes, timeout_seconds)
        return _collect(processes, unfinished, timeout_seconds, folder)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        shutil.rmtree(folder, ignore_errors=True)


def _multiprocessing_context() -> Any:
    """A forkserver that has imported torch and megatron once, which saves seconds in every test.

    CUDA does not survive a fork, so machines that have it start each process from nothing.
    """
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed", "megatron.core.optimizer"])
    return context


def _run_rank(rank: int, call: bytes, variables: dict[str, str], folder: str) -> None:
    """The body of one process: leaves ``rank.result`` or ``rank.error`` in ``folder``."""
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    try:
        import torch

        torch.set_num_threads(1)
        function, args = pickle.loads(call)
        result = function(*args)
        Path(folder, f"{rank}.result").write_bytes(pickle.dumps(result))
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        # Not sys.exit: a rank that waits in a collective may hang the others' clean-up for minutes.
        os._exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _join(processes: Sequence[BaseProcess], timeout_seconds: float) -> list[int]:
    """Waits until all are done, one has failed, or the time is over; returns ranks still alive."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        alive = [process for process in processes if process.is_alive()]
        if not alive:
            return []
        if any(process.exitcode for process in processes):
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        wait([process.sentinel for process in alive], timeout=deadline - time.monotonic())
    return [rank for rank, process in enumerate(processes) if process.is_alive()]


def _collect(
    processes: Sequence[BaseProcess], unfinished: list[int], timeout_seconds: float, folder: Path
) -> list[Any]:
    # The rank that failed first is the cause; the others mostly report a lost connection.
    errors = sorted(folder.glob("*.error"), key=lambda path: path.stat().st_mtime_ns)
    if errors:
        raise DistributedTestError(f"rank {errors[0].stem} failed:\n{errors[0].read_text()}")
    for rank, process in enumerate(processes):
        if process.exitcode:
            raise DistributedTestError(f"rank {rank} died with exit code {process.exitcode}")
    if unfinished:
        raise DistributedTestError(f"ranks {unfinished} still ran after {timeout_seconds} s")
    return [
        pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(len(processes))
    ]


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on.

    Drawn from below Linux's ephemeral range, so that no outgoing connection or gloo listener takes
    it between this check and its use.
    """
    generator = random.SystemRandom()
    for _ in range(100):
        port = generator.randrange(20000, 32000)
        with socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port between 20000 and 32000")


def run_script(
    argv: Sequence[str | Path],
    nproc: int = 1,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    timeout_seconds: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """Runs a root script, or ``["-m", "module", ...]``, with this interpreter and waits for it.

    Args:
        argv: the script's name in the repository (or any path) and its arguments.
        nproc: 1 runs plain python; more runs torchrun with that many processes.
        env: environment variables on top of the test's own.
        cwd: working folder; the repository by default.
        timeout_seconds: after it the process and all its children are killed.

    Returns:
        Exit code, stdout and stderr. torchrun turns every failure into exit code 1.

    Raises:
        subprocess.TimeoutExpired: if it did not finish in time.
    """
    words = [str(word) for word in argv]
    if words[0].endswith(".py"):
        words[0] = str(REPOSITORY_DIR / words[0])
    command = [sys.executable]
    if nproc > 1:
        launcher = "torch.distributed.run"
        command += ["-m", launcher, "--standalone", f"--nproc_per_node={nproc}"]
    command += words
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with subprocess.Popen(
        command,
        cwd=cwd or REPOSITORY_DIR,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout_seconds)
        except BaseException:
            kill_tree(process.pid)
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def kill_tree(pid: int) -> None:
    """Kills a process and all that it started; torchrun gives each worker a session of its own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
