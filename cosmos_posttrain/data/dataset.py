"""Clips of prepared data as token sequences, one split at a time.

Flows in: one or more prepared folders or prefixes. Flows out: ``(seq_length,) int64`` for each clip
of the split, and its manifest row.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from cosmos_posttrain.data.manifest import DocumentRow, Manifest
from cosmos_posttrain.data.shards import Shard, ShardSet, open_shards
from cosmos_posttrain.data.splits import SPLITS, split_sources
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.files import sha256_of_json
from cosmos_posttrain.geometry import LatentShape

_FOREIGN_VOCAB_SIZE = 64000  # of the published tokenizers, which made every foreign data set


class TokenDataset(Dataset[torch.Tensor]):
    """Clips of one split; item i is (seq_length,) int64, each token in [0, vocab_size).

    Args:
        path: a prepared folder, a prefix of .bin/.idx files, or several of the same contract.
        split: ``train``, ``validation``, ``test``, or ``all``.
        split_string: shares of train, validation and test over source videos.
        seed: of the split.
        latent_shape: (T, H, W); needed only for data without a manifest.
        vocab_size: for data without a manifest; default 64,000.

    Attributes:
        manifest: of the (first) folder; None for data without one.
        seq_length: tokens of every clip.
        vocab_size: of the tokenizer.
        fingerprint: equal only for equal data; a resumed run compares it.

    Raises:
        DatasetError: the data is missing, damaged, incomplete, or of different contracts.
        ConfigError: a malformed ``split_string``.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        split: str = "train",
        split_string: str = "98,1,1",
        seed: int = 1234,
        latent_shape: Sequence[int] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        if split not in (*SPLITS, "all"):
            raise DatasetError(f"there is no split {split!r}; use {', '.join(SPLITS)} or all.")
        paths = [path] if isinstance(path, (str, Path)) else list(path)
        sets = [open_shards(item) for item in paths]
        self.split = split
        self.manifest = _common_manifest(paths, sets)
        self._shards = [shard for item in sets for shard in item.shards]
        if not self._shards:
            raise DatasetError(f"{paths[0]} holds no clip: none of its videos could be read.")
        self._ends = list(accumulate(len(shard.reader) for shard in self._shards))
        self.seq_length = _common_length(self._shards)
        self._latent_shape = self._check_shape(latent_shape)
        self.vocab_size = vocab_size or _FOREIGN_VOCAB_SIZE
        if self.manifest is not None:
            self.vocab_size = self.manifest.contract.tokenizer.vocab_size
        self.fingerprint = sha256_of_json([item.fingerprint for item in sets])
        sources = [source for shard in self._shards for source in shard.sources]
        self.indices = np.arange(len(sources))
        if split != "all":
            chosen = set(split_sources(sources, split_string, seed)[split])
            self.indices = np.flatnonzero([source in chosen for source in sources])

    def _check_shape(self, given: Sequence[int] | None) -> LatentShape | None:
        shape = LatentShape(*given) if given is not None else None
        if self.manifest is not None:
            recorded = LatentShape(*self.manifest.contract.latent_shape)
            if shape is not None and shape != recorded:
                raise DatasetError(
                    f"latent shape {tuple(shape)} was asked for, but the data set's is "
                    f"{tuple(recorded)}; leave it out."
                )
            return recorded
        if shape is not None and shape.num_tokens != self.seq_length:
            raise DatasetError(
                f"latent shape {tuple(shape)} has {shape.num_tokens} tokens, but the documents "
                f"have {self.seq_length}; give the shape that the data was made with."
            )
        return shape

    @property
    def latent_shape(self) -> LatentShape:
        """The token grid (T, H, W).

        Raises:
            DatasetError: the data has no manifest and the caller gave no shape.
        """
        if self._latent_shape is None:
            raise DatasetError(
                f"the data set has no manifest, so the grid of its {self.seq_length} tokens is "
                "unknown; give --latent_shape T,H,W."
            )
        return self._latent_shape

    def __len__(self) -> int:
        return len(self.indices)

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        document = int(self.indices[index])
        number = bisect_right(self._ends, document)
        before = self._ends[number - 1] if number else 0
        return self._shards[number], document - before

    def __getitem__(self, index: int) -> torch.Tensor:
        shard, document = self._locate(index)
        tokens = shard.reader[document].astype(np.int64)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise DatasetError(
                f"document {document} of {shard.reader.prefix} holds tokens from {low} to {high}; "
                f"the vocabulary is [0, {self.vocab_size}): prepare the data set again."
            )
        return torch.from_numpy(tokens)

    def row(self, index: int) -> DocumentRow:
        """Where clip ``index`` of the split came from."""
        shard, document = self._locate(index)
        return shard.row(document)

    def source(self, index: int) -> str:
        """The source video of clip ``index`` of the split."""
        shard, document = self._locate(index)
        return shard.sources[document]


def _common_manifest(paths: Sequence[str | Path], sets: Sequence[ShardSet]) -> Manifest | None:
    if not sets:
        raise DatasetError("no data was named; give --data_path.")
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


def _common_length(shards: Sequence[Shard]) -> int:
    lengths = np.unique(np.concatenate([np.unique(shard.reader.lengths) for shard in shards]))
    if len(lengths) != 1 or lengths[0] < 1:
        raise DatasetError(
            f"the documents have between {lengths.min()} and {lengths.max()} tokens; every clip "
            "must have the same number."
        )
    return int(lengths[0])
