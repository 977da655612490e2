"""The source video of every document, compactly: ten million names without ten million objects.

Flows in: shards' sidecars, or ``sources.npz``, which holds the same in one file. Flows out:
``SourceRuns``: names and how many documents in a row have each; and a seeded digest of each name,
from which splits are made.

    sources.npz   names         UTF-8, one after the other, without separators
                  name_bytes    uint32, length of each
                  num_documents uint32, documents in a row that have this source
                  prompt_numbers  uint32, the prompt of each document; only where there are prompts
                  unserved      uint32, documents that belong to no split; only where there are any
                  fingerprint   of the manifest that it belongs to

Preparation writes it just before the manifest. It says nothing that the sidecars do not say: a
folder without it, or with one of another manifest, is read by its sidecars.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.data.layout import SOURCES_FILE
from cosmos_posttrain.data.limits import naming_limits
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.files import replacing

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Of the 32 bytes of a sha256; at ten million names two are the same with a chance of 1e-25.
_DIGEST_BYTES = 16
_AT_ONCE = 100_000  # names that are objects at the same time


@dataclass(frozen=True, eq=False)
class SourceRuns:
    """Names of sources in the order of the documents; a name may come more than once.

    Attributes:
        text: (num_bytes,) uint8, UTF-8 of all names, one after the other.
        name_bytes: (num_runs,) uint32, length of each.
        num_documents: (num_runs,) uint32, documents in a row that have this source.
        prompt_numbers: (all documents,) uint32, the prompt of each; empty without prompts.
        unserved: (n,) uint32, ascending numbers of documents that belong to no split.
    """

    text: NDArray[np.uint8]
    name_bytes: NDArray[np.uint32]
    num_documents: NDArray[np.uint32]
    prompt_numbers: NDArray[np.uint32] = dataclasses.field(
        default_factory=lambda: np.empty(0, np.uint32)
    )
    unserved: NDArray[np.uint32] = dataclasses.field(default_factory=lambda: np.empty(0, np.uint32))

    @classmethod
    def of(
        cls,
        runs: Iterable[tuple[str, int]],
        prompt_numbers: Sequence[int] = (),
        unserved: Sequence[int] = (),
    ) -> SourceRuns:
        """From names and numbers of documents, one after the other.

        Args:
            runs: read to its end before the others are looked at.
            prompt_numbers: of the documents.
            unserved: see the class.
        """
        text, name_bytes, num_documents = bytearray(), array("I"), array("I")
        for name, count in runs:
            encoded = name.encode()
            text += encoded
            name_bytes.append(len(encoded))
            num_documents.append(count)
        return cls(
            np.frombuffer(text, np.uint8),
            np.array(name_bytes, np.uint32),
            np.array(num_documents, np.uint32),
            np.array(prompt_numbers, np.uint32),
            np.array(unserved, np.uint32),
        )

    def __len__(self) -> int:
        return len(self.name_bytes)

    def _encoded(self) -> Iterator[list[bytes]]:
        """The names, some at a time."""
        end = 0
        for first in range(0, len(self), _AT_ONCE):
            lengths = self.name_bytes[first : first + _AT_ONCE].tolist()
            start, end = end, end + sum(lengths)
            part = self.text[start:end].tobytes()
            ends = list(itertools.accumulate(lengths, initial=0))
            yield [part[a:b] for a, b in itertools.pairwise(ends)]

    def names(self) -> Iterator[str]:
        """The source of each run."""
        return (name.decode() for part in self._encoded() for name in part)

    def digests(self, seed: int) -> NDArray[np.uint64]:
        """First 16 bytes of ``sha256("{seed}:{name}")`` of each run, (num_runs, 2) uint64.

        Runs of one source have the same digest, whatever the folder; others differ.
        """
        prefix, sha256 = f"{seed}:".encode(), hashlib.sha256
        digests = np.empty((len(self), 2), np.uint64)
        first = 0
        for names in self._encoded():
            part = b"".join(sha256(prefix + name).digest()[:_DIGEST_BYTES] for name in names)
            digests[first : first + len(names)] = np.frombuffer(part, ">u8").reshape(-1, 2)
            first += len(names)
        return digests

    def save(self, folder: Path, fingerprint: str) -> None:
        """Writes ``sources.npz`` for the manifest of that fingerprint."""
        more: dict[str, Any] = {}
        if len(self.prompt_numbers):
            more["prompt_numbers"] = self.prompt_numbers
        if len(self.unserved):
            more["unserved"] = self.unserved
        with replacing(folder / SOURCES_FILE) as temporary, temporary.open("wb") as file:
            np.savez_compressed(
                file,
                names=self.text,
                name_bytes=self.name_bytes,
                num_documents=self.num_documents,
                fingerprint=np.array(fingerprint.encode()),
                **more,
            )


def load_runs(folder: Path, fingerprint: str, num_documents: int) -> SourceRuns | None:
    """Reads ``sources.npz``; None where there is none of this manifest.

    Raises:
        DatasetError: it is damaged.
    """
    path = folder / SOURCES_FILE
    try:
        with (
            naming_limits(str(path)),
            path.open("rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            if bytes(arrays["fingerprint"]).decode() != fingerprint:
                return None
            nothing = np.empty(0, np.uint32)
            prompts, unserved = (
                arrays.get(name, nothing) for name in ("prompt_numbers", "unserved")
            )
            runs = SourceRuns(
                arrays["names"], arrays["name_bytes"], arrays["num_documents"], prompts, unserved
            )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DatasetError(
            f"{path} is damaged: {error}; delete it: the folder can be read without."
        ) from error
    fits = len(runs.name_bytes) == len(runs.num_documents)
    fits &= int(runs.name_bytes.sum()) == len(runs.text)
    fits &= not len(runs.unserved) or int(runs.unserved.max()) < num_documents
    if not fits or runs.num_documents.sum() != num_documents:
        raise DatasetError(
            f"{path} is damaged: it does not have {num_documents} documents; delete it: the folder "
            "can be read without."
        )
    return runs


def runs_of_sidecars(sidecars: Iterable[tuple[Path, bytes, int]]) -> SourceRuns:
    """Reads the sources out of the shards' sidecars.

    Args:
        sidecars: path, content and number of documents of each, in the order of the shards.

    Raises:
        DatasetError: a sidecar is damaged.
    """
    prompts, unserved = array("I"), array("I")

    def runs() -> Iterator[tuple[str, int]]:
        first = 0
        for path, data, num_documents in sidecars:
            rows = parse_rows(data, path, num_documents)
            unserved.extend(n for n, row in enumerate(rows, first) if "unserved" in row)
            first += num_documents
            sources = [row["source"] for row in rows]
            prompts.extend(row["prompt_number"] for row in rows if "prompt_number" in row)
            yield from ((name, len(list(group))) for name, group in itertools.groupby(sources))

    return SourceRuns.of(runs(), prompts, unserved)


def parse_rows(data: bytes, path: Path, num_documents: int) -> list[dict[str, Any]]:
    """The rows of a sidecar, as plain values with a ``source`` each.

    Raises:
        DatasetError: it is damaged, or has another number of rows.
    """
    try:
        rows = json.loads(b"[" + b",".join(data.splitlines()) + b"]")
        for row in rows:
            row["source"].encode()  # half of a character cannot be
            np.uint32(row.get("prompt_number", 0))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DatasetError(
            f"{path} is damaged: it does not hold a source a line ({error}); prepare the data set "
            "again."
        ) from error
    if len(rows) != num_documents:
        raise DatasetError(
            f"{path} is damaged: it has {len(rows)} rows, the manifest says {num_documents}; "
            "prepare the data set again."
        )
    return rows
