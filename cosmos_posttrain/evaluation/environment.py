"""With what figures were measured.

Flows in: nothing, or a device and a dtype. Flows out: the ``environment`` of a ``metrics.json``.
"""

from __future__ import annotations

import platform
import sys
from importlib import metadata
from typing import Any

import torch

from cosmos_posttrain import launch


def environment(
    device: torch.device | str = "cpu", dtype: torch.dtype | str | None = None
) -> dict[str, Any]:
    """Device, versions and command line.

    Args:
        device: that did the work.
        dtype: that it computed in; None where that is not one thing.
    """
    device = torch.device(device)
    found = {
        "command_line": sys.argv,
        "device": device.type,
        "device_name": device_name(device),
        "num_processes": launch.world_size(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cosmos_posttrain": _version("cosmos_posttrain"),
    }
    return found if dtype is None else found | {"dtype": str(dtype).removeprefix("torch.")}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return None


def device_name(device: torch.device) -> str:
    """The model of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
