"""What is installed here of all that the package can use, and what to do about the rest.

Flows in: this interpreter and machine. Flows out: one ``Installed`` for each, with a few words of
advice where something is missing or was not tried.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain.errors import UserError

# Minor versions of the table in docs/versions.md.
TRIED_MEGATRON = ((0, 15), (0, 16), (0, 17), (0, 18), (0, 19))
OLDEST_TORCH = (2, 6)
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Installed:
    """One row of what is installed.

    Attributes:
        name: as users know it.
        version: or that it is not installed.
        advice: what to do about it; empty where there is nothing to do.
    """

    name: str
    version: str
    advice: str = ""


def version_of(package: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def minor_of(version: str) -> tuple[int, int]:
    """``2.11.0a0+eb65.nv26.2`` -> (2, 11)."""
    major, minor, *_ = [*map(int, re.findall(r"\d+", version)), 0, 0]
    return major, minor


def parts() -> list[Installed]:
    """Everything, in the order of the doctor's table."""
    return [
        Installed("python", platform.python_version(), _python_advice(sys.version_info[:2])),
        *_torch_parts(),
        _part("numpy", "pip install numpy"),
        _megatron_part(),
        _triton_part(),
        _part("transformer-engine", _transformer_engine_advice()),
        _part("apex", "not needed; NVIDIA's images bring it"),
        *_video_parts(),
        _part("nemo_toolkit", "only for NeMo 2: make nemo-env (docs/nemo.md)"),
        _part("nemo_run", "only for cosmos_posttrain.submit: pip install '.[launch]'"),
        _part("megatron-bridge", "not needed; the training scripts run beside it"),
    ]


def _part(package: str, advice: str) -> Installed:
    """A package, with advice for where it is missing."""
    version = version_of(package)
    return Installed(package, version or "not installed", "" if version else advice)


def _python_advice(version: tuple[int, int]) -> str:
    return "" if version >= (3, 11) else "3.11 or newer is needed"


def _torch_parts() -> list[Installed]:
    version = version_of("torch")
    if version is None:
        return [Installed("torch", "not installed", "pip install torch, or an NVIDIA image")]
    is_old = minor_of(version) < OLDEST_TORCH
    torch = Installed("torch", version, "2.6 or newer is needed" if is_old else "")
    return [torch, _cuda_part()]


def _cuda_part() -> Installed:
    try:
        import torch
    except (ImportError, OSError) as error:  # a library that torch was built against is missing
        return Installed("CUDA", "unknown", f"torch cannot be imported ({_first_line(error)})")

    has_driver = _NVIDIA_DRIVER.is_file()
    if torch.version.cuda is None:
        advice = "this machine has an NVIDIA driver: install torch for CUDA" if has_driver else ""
        return Installed("CUDA", "none: torch is built for the CPU", advice)
    if torch.cuda.is_available():
        return Installed("CUDA", torch.version.cuda)
    advice = "no GPU can be used: see nvidia-smi" if has_driver else "no GPU here: runs on the CPU"
    return Installed("CUDA", torch.version.cuda, advice)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _megatron_part() -> Installed:
    name, version = "megatron-core", version_of("megatron-core")
    if version is None:
        return Installed(name, "not installed", "scripts/install.sh, which leaves torch as it is")
    return Installed(name, version, megatron_advice(version))


def megatron_advice(version: str) -> str:
    """What to say of a version of megatron-core; nothing of those that were tried."""
    oldest, newest = TRIED_MEGATRON[0], TRIED_MEGATRON[-1]
    minor = minor_of(version)
    if minor < oldest:
        return f"too old: {oldest[0]}.{oldest[1]} or newer is needed"
    if minor > newest:
        return f"not tried: {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]} are"
    return ""


def _triton_part() -> Installed:
    megatron = version_of("megatron-core")
    is_needed = megatron is not None and minor_of(megatron) >= (0, 19)
    advice = "megatron-core imports it from 0.19 on: pip install triton" if is_needed else ""
    return _part("triton", advice)


def _transformer_engine_advice() -> str:
    if not _NVIDIA_DRIVER.is_file():
        return "only for GPUs"
    return "--layer_spec te needs it: EXTRAS=gpu scripts/install.sh, or an NVIDIA image"


def _video_parts() -> list[Installed]:
    """The two libraries, what FFmpeg the second may find, and which of them reads videos here."""
    try:
        from cosmos_posttrain.video import decoder_label  # with it comes numpy
    except ImportError as error:
        return [Installed("videos are read by", "nothing", _first_line(error))]
    rows = [_library("pyav", "PyAV", "av"), _library("torchcodec", "torchcodec", "torchcodec")]
    codec = ctypes.util.find_library("avcodec") or "none in the system's folders"
    rows.append(Installed("FFmpeg libraries", codec))
    try:
        return [*rows, Installed("videos are read by", decoder_label())]
    except UserError as error:
        return [*rows, Installed("videos are read by", "nothing", str(error).rstrip("."))]


def _library(name: str, shown: str, package: str) -> Installed:
    from cosmos_posttrain.video.choice import loaded

    version = version_of(package)
    if version is None:
        others = {"pyav": "pip install av", "torchcodec": "not needed beside PyAV"}
        return Installed(shown, "not installed", others[name])
    try:
        loaded(name)
    except UserError as error:
        return Installed(shown, version, str(error).rstrip("."))
    return Installed(shown, version)
