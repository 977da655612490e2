"""Names of the files in a prepared folder, and writing them so that no half file is ever seen.

Flows in: bytes and paths. Flows out: files under their final names, complete or not there at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from cosmos_posttrain.errors import DatasetError

MANIFEST_FILE = "manifest.json"
FAILURES_FILE = "failures.jsonl"
PLAN_FILE = "prepare.json"  # what a run that is not complete is about
TEMPORARY_PREFIX = ".tmp-"

_OURS = re.compile(
    r"manifest\.json|failures\.jsonl|prepare\.json|shard-\d{5,}\.(bin|idx|jsonl|json)"
    r"|\.tmp-(manifest\.json|failures\.jsonl|prepare\.json|shard-\d{5,}\.(bin|idx|jsonl|json))"
)


def shard_name(number: int) -> str:
    """``shard-00000`` and so on."""
    return f"shard-{number:05d}"


def is_ours(name: str) -> bool:
    """True for the names that preparation writes, and for no other."""
    return _OURS.fullmatch(name) is not None


def sha256_of_file(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_json(value: Any) -> str:
    """Hash of a value's canonical JSON (sorted keys, no spaces), in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Writes UTF-8 text under a temporary name, forces it to disk and renames it."""
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Writes one JSON object a line, atomically."""
    lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in values]
    write_atomically(path, "".join(lines))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        DatasetError: the file is missing, or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise DatasetError(f"{path} is damaged: it is not JSON ({error}).") from error
    if not isinstance(value, dict):
        raise DatasetError(f"{path} is damaged: it holds no JSON object.")
    return value
