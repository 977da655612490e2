"""Windows of a v2.0 set with their segments, as 1X ships it or imported.

Flows in: a folder. Flows out: tokens by window, and which windows lie in one segment, one after
another. Nothing is held for a window but two numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.data.layout import MANIFEST_FILE, PLAN_FILE
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.files import sha256_of_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.prepare.onex.exporting import ImportedOnex, open_import
from cosmos_posttrain.prepare.onex.folder import OnexFolder

if TYPE_CHECKING:
    from numpy.typing import NDArray

NOT_SERVED = -1


class OnexWindows(ABC):
    """All windows of a set, in 1X's order.

    Attributes:
        tokenizer: that made the tokens.
        latent_shape: of a window.
        fingerprint: of the set; equal for equal data of one form.
        segments: (num_windows,) int64, a number for the segment that all frames of the window come
            from; ``NOT_SERVED`` where they come from two, or there are too few.
    """

    tokenizer: TokenizerInfo
    latent_shape: LatentShape
    fingerprint: str
    segments: NDArray[np.int64]

    @abstractmethod
    def tokens(self, window: int) -> NDArray[np.int64]:
        """A window's tokens, (T * H * W,).

        Raises:
            DatasetError: they are damaged.
        """

    @abstractmethod
    def source(self, window: int) -> str:
        """The segment of a window in words."""

    def starts(self, num_windows: int) -> NDArray[np.int64]:
        """The windows with which so many of one segment begin, one after another."""
        count = max(len(self.segments) - num_windows + 1, 0)
        fits = self.segments[:count] != NOT_SERVED
        for later in range(1, num_windows):
            fits &= self.segments[later : later + count] == self.segments[:count]
        return np.flatnonzero(fits)


def open_windows(path: str | Path, is_test: bool = False) -> OnexWindows:
    """Opens a v2.0 set.

    Args:
        path: a folder as 1X ships it, or one that ``prepare_dataset.py`` imported.
        is_test: it is a test set as 1X ships it: there are no segments, every window is a sample by
            itself.

    Raises:
        DatasetError: nothing is there, it is damaged, or it is not of v2.0.
    """
    folder = Path(path)
    windows: OnexWindows
    if not is_test and any((folder / name).is_file() for name in (MANIFEST_FILE, PLAN_FILE)):
        imported = open_import(folder)
        name, windows = imported.version.name, _ImportedWindows(imported)
    else:
        onex = OnexFolder(folder, is_test)
        name, windows = onex.version.name, _RawWindows(onex)
    if name != "2.0":
        raise DatasetError(
            f"{path} is 1X's v{name}, whose windows are single frames of another tokenizer; give a "
            "v2.0 set (for v1.1, import it and use evaluate.py loss)."
        )
    return windows


class _RawWindows(OnexWindows):
    """Of a folder as 1X ships it."""

    def __init__(self, folder: OnexFolder) -> None:
        self._folder, version = folder, folder.version
        self.tokenizer, self.latent_shape = version.tokenizer, version.clip.latent_shape
        self.fingerprint = sha256_of_json(folder.num_bytes())
        counts = [version.num_windows(shard.num_frames) for shard in folder.shards]
        self._ends = np.cumsum(counts)
        self._ids: list[tuple[int, int]] = []  # shard and segment of each number
        parts = [self._segments_of(shard, n) for shard, n in enumerate(counts)]
        self.segments = np.concatenate(parts)

    def _segments_of(self, shard: int, num_windows: int) -> NDArray[np.int64]:
        """The numbers of a shard's windows; new ones, as no segment reaches over a shard's end."""
        item, step = self._folder.shards[shard], self._folder.version.clip.num_frames
        numbers = np.full(num_windows, NOT_SERVED, np.int64)
        num_full = item.num_frames // step
        frames = self._folder.segments(item, 0, num_full).reshape(num_full, step)
        is_one = (frames == frames[:, :1]).all(axis=1)
        ids, inverse = np.unique(frames[is_one, 0], return_inverse=True)
        numbers[:num_full][is_one] = inverse + len(self._ids)
        self._ids += [(item.number, int(segment)) for segment in ids]
        return numbers

    def tokens(self, window: int) -> NDArray[np.int64]:
        shard = int(np.searchsorted(self._ends, window, side="right"))
        first = window - (int(self._ends[shard - 1]) if shard else 0)
        tokens = self._folder.tokens(self._folder.shards[shard], first, 1)
        return tokens[0].astype(np.int64)

    def source(self, window: int) -> str:
        shard, segment = self._ids[int(self.segments[window])]
        return f"shard {shard} segment {segment}"


class _ImportedWindows(OnexWindows):
    """Of a prepared folder."""

    def __init__(self, imported: ImportedOnex) -> None:
        self._shards = imported.shards
        manifest = self._shards.manifest
        self.tokenizer = manifest.contract.tokenizer
        self.latent_shape = LatentShape(*manifest.contract.latent_shape)
        self.fingerprint = manifest.fingerprint
        runs = self._shards.source_runs()
        numbers: dict[str, int] = {}
        of_runs = [numbers.setdefault(name, len(numbers)) for name in runs.names()]
        self._names = list(numbers)
        self.segments = np.repeat(np.array(of_runs, np.int64), runs.num_documents)
        self.segments[runs.unserved.astype(np.int64)] = NOT_SERVED

    def tokens(self, window: int) -> NDArray[np.int64]:
        tokens: NDArray[Any] = self._shards.tokens(window).astype(np.int64)
        size = self.tokenizer.vocab_size
        if int(tokens.max()) >= size or int(tokens.min()) < 0:
            raise DatasetError(
                f"{self._shards.where(window)} holds tokens outside the vocabulary of {size}; "
                "import it again."
            )
        return tokens

    def source(self, window: int) -> str:
        return self._names[int(self.segments[window])]
