"""Exceptions that carry the process's exit code.

Flows in: anything that goes wrong. Flows out: one sentence (the value, the rule, the fix) and an
exit code. ``UserError`` and its children mean bad usage or bad input (exit code 2); every other
``CosmosPosttrainError`` means that the job itself failed (exit code 1).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable


class CosmosPosttrainError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 1


class UserError(CosmosPosttrainError):
    """Bad usage or bad input: fixed by the person who typed the command."""

    exit_code = 2


class ConfigError(UserError):
    """A flag, a YAML file or an override that does not fit."""


class GeometryError(UserError):
    """A clip that the tokenizer cannot represent, or a grid that the model was not built for."""


class VideoError(UserError):
    """A file that cannot be decoded as video or image."""


class TokenizerError(UserError):
    """Tokenizer weights that are missing, corrupt, or of another kind than asked for."""


class DatasetError(UserError):
    """Prepared data that is missing, damaged, or of another contract than asked for."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not fit the model."""


class OutputFolderError(UserError):
    """An output folder that holds something else than what this command would write there."""


class PartialFailureError(CosmosPosttrainError):
    """Everything that could be done was done and safely written, but some inputs failed."""


class NonFiniteLossError(CosmosPosttrainError):
    """The loss became NaN or infinite; raised before the optimizer step."""


def is_rank_zero() -> bool:
    """True in the process that speaks for all: RANK is 0, or there is no launcher."""
    return int(os.environ.get("RANK", "0")) == 0


def run_cli(main: Callable[[], int | None]) -> None:
    """Runs a script's main function and turns exceptions into exit codes.

    Rank 0 alone prints; the exit code is the exception's own. Ctrl-C exits with 130.
    """
    try:
        code = main()
    except CosmosPosttrainError as error:
        if is_rank_zero():
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        code = 130
    sys.exit(code or 0)
