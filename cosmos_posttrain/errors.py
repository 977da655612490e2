"""Exceptions that carry the process's exit code.

Flows in: anything that goes wrong. Flows out: one sentence (the value, the rule, the fix) and an
exit code, which ``launch.run_cli`` makes the process's own. ``UserError`` and its children mean bad
usage or bad input (exit code 2); every other ``CosmosPosttrainError`` means that the job itself
failed (exit code 1).
"""

from __future__ import annotations


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


class TextError(UserError):
    """A prompt that cannot be encoded, or a text encoder that is missing or damaged."""


class DatasetError(UserError):
    """Prepared data that is missing, damaged, or of another contract than asked for."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or does not fit the model."""


class UnreadableCheckpointError(CheckpointError):
    """A checkpoint that cannot be read now or here, which says nothing of what it holds.

    A file system that does not answer, a machine that does not see a file, too little host memory:
    nothing is moved or given up for it, and the same command may work in a minute.
    """


class OutputFolderError(UserError):
    """An output folder that holds something else than what this command would write there."""


class PartialFailureError(CosmosPosttrainError):
    """Everything that could be done was done and safely written, but some inputs failed."""


class NonFiniteLossError(CosmosPosttrainError):
    """A loss, gradient or weight became NaN or infinite; nothing of it was applied or saved."""


class SaveError(CosmosPosttrainError):
    """Results could not be written: the disk is full, say."""


class RankError(CosmosPosttrainError):
    """A process of the job is gone or stuck, and the others cannot go on without it."""


class StoppedError(CosmosPosttrainError):
    """The job was asked to end, has saved its work, and can be continued."""
