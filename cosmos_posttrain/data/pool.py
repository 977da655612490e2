"""A bounded number of open shards, shared by all data sets of this process.

Flows in: requests for a shard. Flows out: its reader, opened when it is first needed; the one that
was not used for longest is closed in turn. Whoever still reads from a closed one finishes first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from cosmos_posttrain.data.indexed import ShardReader
from cosmos_posttrain.data.limits import is_too_many_files, max_open_shards, naming_limits


class ReaderPool:
    """Open shards by key, the most recently used last."""

    def __init__(self) -> None:
        self._readers: OrderedDict[Hashable, ShardReader] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._readers)

    def reader(self, key: Hashable, open_reader: Callable[[], ShardReader]) -> ShardReader:
        """The reader of a key, opened by ``open_reader`` if it is not open.

        Raises:
            DatasetError: whatever ``open_reader`` finds wrong.
            UserError: this process has too many files open, even without the pool's.
        """
        with self._lock:
            if key in self._readers:
                self._readers.move_to_end(key)
                return self._readers[key]
        try:
            reader = open_reader()
        except OSError as error:
            if not is_too_many_files(error):
                raise
            self.close(lambda _: True)  # others of this process have used up the rest
            with naming_limits(str(error.filename or key)):
                reader = open_reader()
        with self._lock:
            self._readers[key] = reader
            while len(self._readers) > max_open_shards():
                self._readers.popitem(last=False)
        return reader

    def close(self, wanted: Callable[[Hashable], bool]) -> None:
        """Forgets the readers of some keys; their files are closed when nobody uses them."""
        with self._lock:
            for key in [key for key in self._readers if wanted(key)]:
                del self._readers[key]


POOL = ReaderPool()
