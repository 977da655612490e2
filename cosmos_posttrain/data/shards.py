"""All shards below one path: documents by number, opened when they are read.

Flows in: a folder or a path prefix. Flows out: tokens, rows and sources of documents. Nothing is
held for a shard but a few numbers; its files are open only while it is in the pool.

Layouts:
  ours        a folder with ``manifest.json``, shards and their sidecars (``prepared.py``)
  original    files named exactly ``.bin`` and ``.idx`` in a folder, or in its numbered subfolders
  plain       ``PREFIX.bin`` and ``PREFIX.idx``, or a folder of such pairs
The last two have no manifest: each document counts as its own source (``foreign.py``).
"""

from __future__ import annotations

import itertools
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.data.indexed import ShardReader
from cosmos_posttrain.data.manifest import DocumentRow, Manifest
from cosmos_posttrain.data.pool import POOL
from cosmos_posttrain.data.source_runs import SourceRuns

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_numbers = itertools.count()


class OpenShards(ABC):
    """Documents of several shards by number, whatever they hold; can be pickled.

    Attributes:
        ends: (num_shards,) int64, documents up to and with each shard.
    """

    holds_floats = False

    def __init__(self, num_documents: NDArray[np.int64]) -> None:
        self.ends: NDArray[np.int64] = np.cumsum(num_documents)
        self._checked = np.zeros(len(num_documents), bool)
        self._register()

    def _register(self) -> None:
        number = next(_numbers)
        self._key = number
        weakref.finalize(self, POOL.close, lambda key: key[0] == number)  # type: ignore[index]

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._register()

    def __len__(self) -> int:
        """Documents of all shards."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @abstractmethod
    def prefix(self, shard: int) -> str:
        """Path of a shard's files without their extension."""

    def _check(self, shard: int, reader: ShardReader) -> None:  # noqa: B027
        """Called when a shard is opened for the first time in this process."""

    def locate(self, document: int) -> tuple[int, int]:
        """The shard that holds a document, and its number there."""
        shard = int(np.searchsorted(self.ends, document, side="right"))
        return shard, document - (int(self.ends[shard - 1]) if shard else 0)

    def tokens(self, document: int) -> NDArray[Any]:
        """(length,) in the dtype on disk; not to be written to.

        Raises:
            DatasetError: the shard is missing or damaged.
            UserError: too many files are open.
        """
        shard, number = self.locate(document)
        reader = POOL.reader(
            (self._key, shard), lambda: ShardReader(self.prefix(shard), self.holds_floats)
        )
        if not self._checked[shard]:
            self._check(shard, reader)
            self._checked[shard] = True
        return reader[number]

    def where(self, document: int) -> str:
        """A document in words, for errors."""
        shard, number = self.locate(document)
        return f"document {number} of {self.prefix(shard)}"


class ShardSet(OpenShards):
    """All shards below one path: clips, each (seq_length,) tokens.

    Attributes:
        manifest: None for folders that were not prepared by this program.
        fingerprint: equal only for equal data.
        seq_length: tokens of each document.
    """

    manifest: Manifest | None
    fingerprint: str
    seq_length: int

    @abstractmethod
    def row(self, document: int) -> DocumentRow:
        """Where a document came from.

        Raises:
            DatasetError: the sidecar is missing or damaged.
        """

    @abstractmethod
    def source_runs(self) -> SourceRuns:
        """The source of every document; read anew each time.

        Raises:
            DatasetError: a sidecar is missing or damaged.
        """

    def text_rows(self, document: int) -> Tensor | None:
        """A document's text as (length, width) embeddings; None for data without prompts."""
        return None

    def states(self, document: int) -> NDArray[np.float32] | None:
        """What belongs to each frame of a document, (num_frames, width); None where nothing does.

        Raises:
            DatasetError: the file is missing or damaged.
        """
        return None
