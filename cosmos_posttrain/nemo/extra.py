"""Whether NeMo 2 is here; light, and the only place that asks.

Flows in: the environment. Flows out: yes or no, or one sentence that says what to install.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from cosmos_posttrain.errors import ConfigError

_FIX = (
    "run make nemo-env and use its environment's Python, or NVIDIA's NeMo container up to 26.02 "
    "(docs/nemo.md); --engine direct needs no NeMo"
)


def is_installed() -> bool:
    """Whether NeMo's Lightning part can be found; imports next to nothing.

    Not ``nemo`` alone: any folder of that name beside a program would be it.
    """
    try:
        return find_spec("nemo.lightning") is not None
    except (ModuleNotFoundError, ValueError):
        return False


def check() -> None:
    """Makes sure that ``nemo.collections.llm`` can train; imports it, which takes a while.

    Raises:
        ConfigError: NeMo is missing, or lacks something that it does not say.
    """
    if not is_installed():
        raise ConfigError(f"--engine nemo needs NeMo 2, which is not installed here: {_FIX}.")
    try:
        found = hasattr(import_module("nemo.collections.llm"), "train")
        reason = "nemo.collections.llm has no train, as without nvidia-modelopt"
    except Exception as error:  # what it imports checks signatures, too
        found, reason = False, (str(error).splitlines() or [repr(error)])[0].rstrip(".")
    if not found:
        raise ConfigError(f"--engine nemo cannot use the NeMo that is here ({reason}): {_FIX}.")
