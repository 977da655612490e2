"""Clips of prepared data as token sequences, one split at a time.

Flows in: one or more prepared folders or prefixes. Flows out: ``(seq_length,) int64`` for each clip
of the split, and its manifest row.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from cosmos_posttrain.data.config import SPLITS
from cosmos_posttrain.data.documents import open_documents
from cosmos_posttrain.data.manifest import DocumentRow
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.text.rows import pad_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FOREIGN_VOCAB_SIZE = 64000  # of the published tokenizers, which made every foreign data set


class TokenDataset(Dataset[torch.Tensor]):
    """Clips of one split; item i is (seq_length,) int64, each token in [0, vocab_size).

    Shards are opened when they are read, a bounded number at a time. Data sets of the same folder
    share them and all that was read of the manifest; ``other_split`` is the short way to one.

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
        fingerprints: of each folder.
        indices: (len(self),) int64, numbers of the split's documents in the folder(s).

    Raises:
        DatasetError: the data is missing, damaged, incomplete, or of different contracts.
        ConfigError: a malformed ``split_string``.
        UserError: too many files are open.
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
        _check_split(split)
        paths = [path] if isinstance(path, (str, Path)) else list(path)
        self._documents = open_documents(paths)
        self.split, self._split_string, self._seed = split, split_string, seed
        self.manifest = self._documents.manifest
        self.seq_length = self._documents.seq_length
        self.fingerprint = self._documents.fingerprint
        self.fingerprints = self._documents.fingerprints
        self._latent_shape = self._check_shape(latent_shape)
        self.vocab_size = vocab_size or _FOREIGN_VOCAB_SIZE
        if self.manifest is not None:
            self.vocab_size = self.manifest.contract.tokenizer.vocab_size
        self.indices = self._documents.indices(split, split_string, seed)

    def other_split(self, split: str) -> TokenDataset:
        """Another split of the same data, with the same settings; opens nothing anew."""
        _check_split(split)
        other = copy.copy(self)
        other.split = split
        other.indices = self._documents.indices(split, self._split_string, self._seed)
        return other

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

    def _document(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        return int(self.indices[index])

    def __getitem__(self, index: int) -> torch.Tensor:
        document = self._document(index)
        tokens = self._documents.tokens(document).astype(np.int64)
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            raise DatasetError(
                f"{self._documents.where(document)} holds tokens from {low} to {high}; the "
                f"vocabulary is [0, {self.vocab_size}): prepare the data set again."
            )
        return torch.from_numpy(tokens)

    def context(self, index: int) -> torch.Tensor | None:
        """The text of clip ``index`` as a model attends to it; None for base data.

        Returns:
            (context_len, width) float32, zero rows behind the prompt's own.
        """
        rows = self._documents.text_rows(self._document(index))
        if rows is None:
            return None
        assert self.manifest is not None and self.manifest.contract.context_len is not None
        return pad_rows([rows.float()], self.manifest.contract.context_len)[0]

    def states(self, index: int) -> torch.Tensor | None:
        """What belongs to each frame of clip ``index``, such as a robot's state.

        Returns:
            (num_frames, width) float32; None for data without.
        """
        states = self._documents.states(self._document(index))
        return None if states is None else torch.from_numpy(states)

    def row(self, index: int) -> DocumentRow:
        """Where clip ``index`` of the split came from."""
        return self._documents.row(self._document(index))

    def source_numbers(self) -> NDArray[np.int64]:
        """(len(self),) a number for each clip's source video, equal for clips of the same."""
        numbers: NDArray[np.int64] = self._documents.source_numbers()[self.indices]
        return numbers

    def set_numbers(self) -> NDArray[np.int64]:
        """(len(self),) which of the folders each clip lies in, counted from 0."""
        return self._documents.set_numbers(self.indices)

    def shuffled(self, seed: int) -> TokenDataset:
        """The same clips in another order, so that the first of them are of all folders."""
        other = copy.copy(self)
        other.indices = np.random.default_rng(seed).permutation(self.indices)
        return other

    def source(self, index: int) -> str:
        """The source video of clip ``index`` of the split."""
        return self.row(index).source


def _check_split(split: str) -> None:
    if split not in (*SPLITS, "all"):
        raise DatasetError(f"there is no split {split!r}; use {', '.join(SPLITS)} or all.")
