"""All documents of one or more folders, opened once for everything in this process that reads them.

Flows in: folders or prefixes. Flows out: documents by number, and the split of each. Data sets of
the same folders share one ``Documents`` for as long as one of them lives.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.data.config import SPLITS
from cosmos_posttrain.data.foreign import ForeignShards, find_pairs
from cosmos_posttrain.data.layout import MANIFEST_FILE, PLAN_FILE
from cosmos_posttrain.data.manifest import DocumentRow, Manifest
from cosmos_posttrain.data.prepared import PreparedShards
from cosmos_posttrain.data.shards import ShardSet
from cosmos_posttrain.data.splits import number_sources, parse_split_string, split_digests
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.files import sha256_of_json

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_opened_shards: weakref.WeakValueDictionary[Any, ShardSet] = weakref.WeakValueDictionary()
_opened_documents: weakref.WeakValueDictionary[Any, Documents] = weakref.WeakValueDictionary()


def open_shards(path: str | Path) -> ShardSet:
    """Opens whatever prepared data lies at ``path``, a folder or a prefix.

    Raises:
        DatasetError: nothing is there, or it is damaged or incomplete.
        UserError: too many files are open.
    """
    folder = Path(os.path.abspath(path))  # files are opened later, whatever the folder is then
    if any((folder / name).is_file() for name in (MANIFEST_FILE, PLAN_FILE)):
        key = _state_of([str(folder / MANIFEST_FILE)])
        shards = _opened_shards.get(key) if key else None
        if shards is None:
            shards = PreparedShards(folder)
    else:
        pairs = find_pairs(str(folder))
        if not pairs:
            what = "holds no prepared data" if folder.exists() else "does not exist"
            raise DatasetError(
                f"{path} {what}; name a folder that prepare_dataset.py wrote, or a prefix of "
                ".bin and .idx files."
            )
        key = _state_of([f"{prefix}.{end}" for _, prefix in pairs for end in ("idx", "bin")])
        shards = _opened_shards.get(key) if key else None
        if shards is None:
            shards = ForeignShards(pairs)
    if key:
        _opened_shards[key] = shards
    return shards


def _state_of(paths: list[str]) -> tuple[Any, ...] | None:
    """Changes when one of the files is replaced or written to; None where one is missing."""
    try:
        states = [(os.path.realpath(path), os.stat(path)) for path in paths]
    except OSError:
        return None
    return tuple((path, s.st_ino, s.st_size, s.st_mtime_ns) for path, s in states)


def open_documents(paths: Sequence[str | Path]) -> Documents:
    """All documents of some folders, shared with those that are open already.

    Raises:
        DatasetError: a folder is missing, damaged or empty, or they do not go together.
        UserError: too many files are open.
    """
    if not paths:
        raise DatasetError("no data was named; give --data_path.")
    sets = [open_shards(path) for path in paths]
    # Identities hold while the sets live, and what is found under this key keeps them alive.
    key = tuple(id(item) for item in sets)
    documents = _opened_documents.get(key)
    if documents is None:
        documents = Documents(paths, sets)
        _opened_documents[key] = documents
    return documents


class Documents:
    """All documents of one or more folders of the same contract, in order.

    Attributes:
        manifest: of the first folder; None for data without one.
        seq_length: tokens of every document.
        fingerprint: equal only for equal data.
        fingerprints: of each folder.
    """

    def __init__(self, paths: Sequence[str | Path], sets: Sequence[ShardSet]) -> None:
        self._sets = list(sets)
        self.manifest = _common_manifest(paths, sets)
        if not any(len(item) for item in sets):
            raise DatasetError(f"{paths[0]} holds no clip: none of its videos could be read.")
        lengths = sorted({item.seq_length for item in sets if len(item)})
        if len(lengths) > 1:
            raise DatasetError(
                f"the documents have between {lengths[0]} and {lengths[-1]} tokens; every clip "
                "must have the same number."
            )
        self.seq_length = lengths[0]
        self.fingerprints = tuple(item.fingerprint for item in sets)
        self.fingerprint = sha256_of_json(list(self.fingerprints))
        self._ends: NDArray[np.int64] = np.cumsum([len(item) for item in sets])
        self._splits: dict[tuple[str, int], NDArray[np.uint8]] = {}
        self._num_unserved = sum(
            item.manifest.num_unserved for item in sets if item.manifest is not None
        )
        if self._num_unserved == len(self):
            raise DatasetError(
                f"{paths[0]} holds no clip to use: all {len(self)} of its documents are stored "
                "only, as their frames do not belong together."
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def indices(self, split: str, split_string: str, seed: int) -> NDArray[np.int64]:
        """Numbers of the documents of a split, ascending; ``all`` is every one that is served.

        Raises:
            ConfigError: a malformed ``split_string``.
            DatasetError: the sources cannot be read.
        """
        if split == "all" or not any(parse_split_string(split_string)[1:]):
            if split not in ("all", "train"):
                return np.arange(0)
            return np.flatnonzero(self._served()) if self._num_unserved else np.arange(len(self))
        if (split_string, seed) not in self._splits:
            self._splits[split_string, seed] = self._split(split_string, seed)
        return np.flatnonzero(self._splits[split_string, seed] == SPLITS.index(split))

    def source_numbers(self) -> NDArray[np.int64]:
        """(len(self),) a number for the source of every document, equal for equal sources."""
        digests, num_documents = self._digests(seed=0)
        return np.repeat(number_sources(digests), num_documents)

    def set_numbers(self, documents: NDArray[np.int64]) -> NDArray[np.int64]:
        """(len(documents),) which of the folders each of some documents lies in."""
        return np.searchsorted(self._ends, documents, side="right")

    def _split(self, split_string: str, seed: int) -> NDArray[np.uint8]:
        """The split of every document, as its number in ``SPLITS``; another one is in none."""
        digests, num_documents = self._digests(seed)
        splits = np.repeat(split_digests(digests, split_string), num_documents)
        if self._num_unserved:
            splits[~self._served()] = len(SPLITS)
        return splits

    def _digests(self, seed: int) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """Of the source of each run of documents, (runs, 2), and how many there are in it."""
        digests, num_documents = [], []
        for shards in self._sets:
            runs = shards.source_runs()
            digests.append(runs.digests(seed))
            num_documents.append(runs.num_documents)
            del runs  # the names are the largest part
        return np.concatenate(digests), np.concatenate(num_documents)

    def _served(self) -> NDArray[np.bool_]:
        """Which documents belong to a split at all; read anew each time."""
        served = np.ones(len(self), bool)
        for shards, end in zip(self._sets, self._ends.tolist(), strict=True):
            served[end - len(shards) + shards.source_runs().unserved.astype(np.int64)] = False
        return served

    def _locate(self, document: int) -> tuple[ShardSet, int]:
        number = int(np.searchsorted(self._ends, document, side="right"))
        return self._sets[number], document - (int(self._ends[number - 1]) if number else 0)

    def tokens(self, document: int) -> NDArray[Any]:
        """(seq_length,) in the dtype on disk; not to be written to."""
        shards, number = self._locate(document)
        return shards.tokens(number)

    def row(self, document: int) -> DocumentRow:
        """Where a document came from."""
        shards, number = self._locate(document)
        return shards.row(number)

    def text_rows(self, document: int) -> Tensor | None:
        """A document's text as (length, width) embeddings; None for data without prompts."""
        shards, number = self._locate(document)
        return shards.text_rows(number)

    def states(self, document: int) -> NDArray[np.float32] | None:
        """What belongs to each frame of a document, (num_frames, width); None without."""
        shards, number = self._locate(document)
        return shards.states(number)

    def where(self, document: int) -> str:
        """A document in words, for errors."""
        shards, number = self._locate(document)
        return shards.where(number)


def _common_manifest(paths: Sequence[str | Path], sets: Sequence[ShardSet]) -> Manifest | None:
    first = sets[0].manifest
    for path, item in zip(paths[1:], sets[1:], strict=True):
        if (first is None) != (item.manifest is None):
            raise DatasetError(f"{paths[0]} and {path} differ: only one of them has a manifest.")
        if first is not None and item.manifest is not None:
            difference = first.contract.difference(item.manifest.contract)
            if difference:
                raise DatasetError(
                    f"{paths[0]} and {path} cannot be used together: {difference}; prepare them "
                    "with the same tokenizer and clip size."
                )
    return first
