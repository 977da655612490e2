"""Whether a checkpoint of a run is whole, as far as names, sizes and tables tell.

Flows in: a checkpoint folder. Flows out: what is wrong with it, in a few words. The numbers
themselves are not read; what is wrong with those, loading finds (see ``dist.load``).
"""

from __future__ import annotations

from pathlib import Path

from cosmos_posttrain.checkpoint import context, guard
from cosmos_posttrain.checkpoint.formats.megatron import CONTEXT, WEIGHTS
from cosmos_posttrain.errors import CheckpointError, UnreadableCheckpointError

_COUNTS = ("completed_steps", "consumed_samples")


def problem(checkpoint: Path) -> str | None:
    """What is missing or damaged, as a sentence; None where nothing seems to be.

    Raises:
        UnreadableCheckpointError: a file is there and cannot be read, which is no damage: a network
            file system that does not answer, missing permissions, too little memory.
    """
    try:
        return _problem(checkpoint)
    except UnreadableCheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return str(error)
        raise
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        raise guard.unreadable(str(error.filename or checkpoint), error) from error


def _problem(checkpoint: Path) -> str | None:
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            path.open("rb").close()
    context.read_model_config(checkpoint)
    context.read_data(checkpoint)
    state = context.read_json(checkpoint / CONTEXT / "state.json")
    if (row := checkpoint / CONTEXT / "metrics.json").exists():
        context.read_json(row)
    check_weights(checkpoint / WEIGHTS)
    if not all(isinstance(state.get(key), int) for key in _COUNTS):
        return f"{checkpoint / CONTEXT / 'state.json'} does not say how far the run was."
    return None


def check_weights(folder: Path) -> None:
    """Compares the files of a torch_dist folder with its index.

    Raises:
        CheckpointError: names the first that is wrong.
    """
    metadata = guard.read_metadata(folder)
    guard.read_common(folder)
    context.read_json(folder / "metadata.json")
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        name = str(place.relative_path)
        ends[name] = max(ends.get(name, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; restore the checkpoint.")
        if path.stat().st_size < end:
            raise CheckpointError(
                f"{path} is truncated: it has {path.stat().st_size} bytes of {end}; restore the "
                "checkpoint."
            )
