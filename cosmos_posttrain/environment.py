"""What a job ran on, and how it was called: recorded beside its results. No torch of its own.

Flows in: this process. Flows out: plain values for JSON. torch is asked only if it is loaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from cosmos_posttrain import launch

PACKAGES = (
    *("cosmos_posttrain", "torch", "megatron-core", "transformer-engine", "numpy"),
    *("av", "torchcodec"),
)
_GIT_SECONDS = 5


def describe() -> dict[str, Any]:
    """Command line, versions, devices and number of processes; what is absent is left out."""
    found: dict[str, Any] = {"command_line": list(sys.argv), "python": platform.python_version()}
    found["platform"] = platform.platform()
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if commit := _commit():
        found["commit"] = commit
    found["processor"] = processor()
    found["num_cpu_cores"] = os.cpu_count()
    found["num_processes"] = launch.world_size()
    return found | _from_torch()


def _from_torch() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    found: dict[str, Any] = {"num_threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["gpu"] = torch.cuda.get_device_name()
        found["num_gpus"] = torch.cuda.device_count()
    return found


def processor() -> str:
    """The model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The checkout's commit, with a + where files differ from it; None outside of one."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *words],
                capture_output=True,
                text=True,
                timeout=_GIT_SECONDS,
                check=True,
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changes else "")
