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
# Not nemo alone: any folder of that name beside a program would be it. nemo_toolkit by itself
# brings neither of the other two, without which nemo.lightning cannot be imported.
_NEEDED = ("nemo.lightning", "lightning", "fiddle")


def is_installed() -> bool:
    """Whether NeMo's Lightning part and what that needs can be found; imports little."""
    return not _missing()


def _missing() -> list[str]:
    """What cannot be found of all that is needed before anything else."""
    return [name for name in _NEEDED if not _is_found(name)]


def _is_found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def check() -> None:
    """Makes sure that ``nemo.collections.llm`` can train; imports it, which takes a while.

    Raises:
        ConfigError: NeMo is missing, or lacks something that it does not say.
    """
    missing = _missing()
    if _NEEDED[0] in missing:
        raise ConfigError(f"--engine nemo needs NeMo 2, which is not installed here: {_FIX}.")
    if missing:
        names = " and ".join(missing)
        raise ConfigError(
            f"--engine nemo cannot use the NeMo that is here without {names}: {_FIX}."
        )
    try:
        found = hasattr(import_module("nemo.collections.llm"), "train")
        reason = "nemo.collections.llm has no train, as without nvidia-modelopt"
    except Exception as error:  # what it imports checks signatures, too
        found, reason = False, (str(error).splitlines() or [repr(error)])[0].rstrip(".")
    if not found:
        raise ConfigError(f"--engine nemo cannot use the NeMo that is here ({reason}): {_FIX}.")
