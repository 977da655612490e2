"""What an offline W&B run has stored, read back without wandb's own (compiled) reader.

Flows in: the folder that wandb writes into. Flows out: for each launch the run's id, and its rows
of history. The file is a log of protocol buffers as LevelDB writes one (blocks of 32 KiB, records
cut at their ends), behind seven bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HEADER, _BLOCK, _RECORD = 7, 32768, struct.Struct("<IHB")
_FULL, _LAST = 1, 4


@dataclass
class OfflineLaunch:
    """One launch of a run.

    Attributes:
        folder: of it.
        run_id: of the run.
        history: what was logged, one dict a step.
    """

    folder: Path
    run_id: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)


def read_launches(run: Path) -> list[OfflineLaunch]:
    """Those of a run folder, in the order in which they were made."""
    return [_read(folder) for folder in sorted((run / "wandb").glob("offline-run-*"))]


def _read(folder: Path) -> OfflineLaunch:
    from wandb.proto import wandb_internal_pb2

    launch = OfflineLaunch(folder)
    (path,) = folder.glob("*.wandb")
    for data in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            launch.run_id = record.run.run_id
        elif record.WhichOneof("record_type") == "history":
            items = record.history.item
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            launch.history.append(row)
    return launch


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    place, parts = _HEADER, b""
    while place + _RECORD.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _RECORD.size:
            place += left
            continue
        _, length, kind = _RECORD.unpack_from(data, place)
        place += _RECORD.size
        parts += data[place : place + length]
        place += length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
