"""This process among those that were launched: rank, device, dtype, what it says, how it ends.

Flows in: the launcher's environment (``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE``; none under plain
python). Flows out: the same answers for every room. torch is imported only where it is needed.
Nothing else in the package reads these variables.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError

if TYPE_CHECKING:
    import torch

DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ("auto", "cpu", "cuda")

_PR_SET_PDEATHSIG = 1
# How long another rank waits for rank 0 to say the same before it speaks.
_PATIENCE_SECONDS = 2.0
# The same where nothing but the processes themselves keeps a store, and they start one by one.
_PATIENCE_WITHOUT_LAUNCHER_SECONDS = 10.0


def _variable(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value else default


def _group() -> Any:
    """torch.distributed where a process group exists, else None; imports nothing."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    ready = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if ready else None


def rank() -> int:
    """Rank of this process, before or after the process groups exist."""
    group = _group()
    return int(group.get_rank()) if group else _variable("RANK", 0)


def world_size() -> int:
    """Processes in this job, before or after the process groups exist."""
    group = _group()
    return int(group.get_world_size()) if group else _variable("WORLD_SIZE", 1)


def local_rank() -> int:
    """Number of this process among those of its machine."""
    return _variable("LOCAL_RANK", 0)


def local_world_size() -> int:
    """Processes of this job on this machine: as the launcher says, else by the machines' names.

    Where the launcher does not say, every rank takes part; before the process groups exist, all
    processes count as this machine's.
    """
    count, group = world_size(), _group()
    if group and count > 1 and not os.environ.get("LOCAL_WORLD_SIZE"):
        names = [""] * count
        group.all_gather_object(names, socket.gethostname())
        count = names.count(socket.gethostname())
    return _variable("LOCAL_WORLD_SIZE", count)


def is_launched() -> bool:
    """True where a launcher has said how the processes find one another."""
    return "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def is_rank_zero() -> bool:
    """True in the process that speaks and writes for all."""
    return rank() == 0


# The terminal on which a progress line waits to be rewritten.
_open_line: TextIO | None = None


def hold_line(stream: TextIO | None) -> None:
    """Notes where an unfinished line stands, so that what is said next begins a new one."""
    global _open_line
    _open_line = stream


def _print(text: str, stream: TextIO) -> None:
    if _open_line is not None:
        print(file=_open_line, flush=True)
        hold_line(None)
    print(text, file=stream, flush=True)


def say(text: str, error: bool = False) -> None:
    """Prints a line, once: on rank 0, to standard output or standard error."""
    if is_rank_zero():
        _print(text, sys.stderr if error else sys.stdout)


def device(requested: str | torch.device = "auto") -> torch.device:
    """The device of this process: one rule for every room.

    Args:
        requested: ``auto`` is this process's GPU where there is one, else the CPU; ``cuda`` is this
            process's GPU; ``cpu`` and ``cuda:N`` are what they say.

    Raises:
        ConfigError: no such device, or fewer GPUs on this machine than processes.
    """
    import torch

    try:
        chosen = torch.device("cuda" if str(requested) == "auto" else requested)
    except RuntimeError as error:
        raise ConfigError(f"{requested!r} is not a device; use {', '.join(DEVICES)}.") from error
    if chosen.type not in ("cpu", "cuda", "meta"):
        raise ConfigError(f"device {requested} is not supported; use {', '.join(DEVICES)}.")
    if chosen.type != "cuda":
        return chosen
    if not torch.cuda.is_available():
        if str(requested) == "auto":
            return torch.device("cpu")
        raise ConfigError(f"device {requested} was asked for, but CUDA is absent; use cpu.")
    count = torch.cuda.device_count()
    if chosen.index is not None and chosen.index >= count:
        raise ConfigError(
            f"device {requested} was asked for, but this machine shows {count} GPU(s), numbered "
            "from 0; name another, or check CUDA_VISIBLE_DEVICES."
        )
    index = local_rank() if chosen.index is None else chosen.index
    if index >= count:
        raise ConfigError(
            f"this machine shows {count} GPU(s), too few for process {index + 1} on it (LOCAL_RANK "
            f"{index}); start fewer processes, or check CUDA_VISIBLE_DEVICES."
        )
    return torch.device("cuda", index)


def parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Reads ``bfloat16`` and its kin; None stays None.

    Raises:
        ConfigError: any other name, or a dtype that is none of floating point.
    """
    if dtype is None:
        return None
    import torch

    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"there is no dtype {name!r}; use one of {', '.join(DTYPES)}.")
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


# The end of a process.


class StopSignal:
    """Turns SIGTERM and SIGUSR1 into a note that a long job reads after each step.

    A scheduler and torchrun send SIGTERM and wait a while before they kill. More of the same (a
    worker may get one from each of them) changes nothing. Outside the main thread, where Python
    installs no handlers, nothing is ever noted.

    Attributes:
        requested: name of the first signal that came; None before.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._process = os.getpid()
        self._former: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._former[number] = signal.signal(number, self._note) or signal.SIG_DFL

    def _note(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process:  # a forked helper, which has nothing to save
            signal.signal(number, self._former[number])
            os.kill(os.getpid(), number)
            return
        self.requested = self.requested or signal.Signals(number).name

    def close(self) -> None:
        """Puts the former handlers back."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs a script's main function and turns exceptions into exit codes.

    An error is printed once for all ranks; the exit code is the exception's own. Ctrl-C exits with
    130. Under torchrun the process ends with its launcher.
    """
    _end_with_launcher()
    try:
        code = main()
    except CosmosPosttrainError as error:
        print_once(str(error))
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code or 0)


def print_once(sentence: str) -> None:
    """Rank 0 prints what it met; another rank prints what rank 0 does not, with its rank.

    Before torch is imported only the command line has been read, which is the same for all.
    """
    number = rank()
    if "torch" not in sys.modules or world_size() == 1:
        say(f"error: {sentence}", error=True)
        return
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    key = f"cosmos_posttrain/{attempt}/{hashlib.sha256(sentence.encode()).hexdigest()}"
    where = "" if number == 0 else f" on rank {number}"
    line = f"error{where}: {sentence}"
    if "TORCHELASTIC_RUN_ID" not in os.environ and is_launched() and _group() is None:
        _print_without_launcher(line, key)
        return
    store = launcher_store()
    if store is not None and number != 0:
        end = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < end and not _said(store, key):
            time.sleep(0.1)
    if store is None or _claim(store, key):
        _print(line, sys.stderr)


def _print_without_launcher(line: str, key: str) -> None:
    """``print_once`` under srun, before the processes met: rank 0 keeps a store for a while.

    There the others find that it said the same. Where they find nothing, they have an error of
    their own, or rank 0 is not to be reached, and they speak.
    """
    end = time.monotonic() + _PATIENCE_WITHOUT_LAUNCHER_SECONDS
    if rank() == 0:
        _print(line, sys.stderr)
        _tell_others(key, end)
        return
    while time.monotonic() < end:
        store = launcher_store()
        if store is not None and _said(store, key):
            _claim(store, f"{key}/heard")
            return
        time.sleep(0.5)
    _print(line, sys.stderr)


def _tell_others(key: str, end: float) -> None:
    import torch.distributed

    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = torch.distributed.TCPStore(*address, is_master=True, wait_for_workers=False)
        store.set(key, "")
        while store.add(f"{key}/heard", 0) < world_size() - 1 and time.monotonic() < end:
            time.sleep(0.05)
    except Exception:  # the others then say it too
        return


def launcher_store(timeout_seconds: float = _PATIENCE_SECONDS) -> Any:
    """The store at which the processes met; None where it cannot be reached (any more).

    Args:
        timeout_seconds: how long connecting, and each question to it, may take.
    """
    import torch.distributed

    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # Where nobody listens (any more), torch would try for long and print all about it.
        socket.create_connection(address, timeout=timeout_seconds).close()
        return torch.distributed.TCPStore(
            *address,
            is_master=False,
            timeout=timedelta(seconds=timeout_seconds),
            wait_for_workers=False,
        )
    except Exception:  # whatever it is, the error that is to be printed counts more
        return None


def _said(store: Any, key: str) -> bool:
    try:
        return bool(store.check([key]))
    except Exception:
        return False


def _claim(store: Any, key: str) -> bool:
    try:
        return int(store.add(key, 1)) == 1
    except Exception:
        return True


def _end_with_launcher() -> None:
    """Under torchrun on Linux, asks the kernel to end this process when its launcher ends.

    A launcher that is killed cannot end its workers, which would keep GPUs, memory and locks. A
    plain python process may outlive the shell that started it, so nothing is asked for it. Helper
    processes that are forked later end with this one.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    ask()
    if os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():
        os.kill(os.getpid(), signal.SIGKILL)  # the launcher was gone before the kernel was asked
    in_main_thread = True

    def before_fork() -> None:
        # The kernel watches the thread that forks, and other threads end earlier.
        nonlocal in_main_thread
        in_main_thread = threading.current_thread() is threading.main_thread()

    def after_fork() -> None:
        if in_main_thread:
            ask()

    os.register_at_fork(before=before_fork, after_in_child=after_fork)
