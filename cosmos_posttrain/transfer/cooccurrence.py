"""How much new and old tokens overlap, and the file that keeps it.

Flows in: sums of overlap by pair of tokens (``counting.py``). Flows out: a ``Cooccurrence`` in one
safetensors file, with both tokenizers' hashes in its header.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.data.serial import from_plain, to_plain
from cosmos_posttrain.errors import DatasetError, OutputFolderError
from cosmos_posttrain.files import replacing

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT_VERSION = 1
_ARRAYS = ("new_tokens", "old_tokens", "volumes", "occurrences")


@dataclass(frozen=True)
class Cooccurrence:
    """Volumes of overlap between new and old tokens.

    Attributes:
        old: the tokenizer that the model was trained on.
        new: the tokenizer that it shall be trained on.
        new_tokens: (N,) int32, ascending; pairs are distinct and sorted by (new, old).
        old_tokens: (N,) int32.
        volumes: (N,) float32, above 0.
        occurrences: (new vocabulary,) int64, how often each new token was seen in a matched clip.
        record: settings, data sets and counts.
    """

    old: TokenizerInfo
    new: TokenizerInfo
    new_tokens: NDArray[np.int32]
    old_tokens: NDArray[np.int32]
    volumes: NDArray[np.float32]
    occurrences: NDArray[np.int64]
    record: dict[str, Any]

    def save(self, path: Path) -> None:
        """Writes the file under a temporary name and renames it.

        Raises:
            OutputFolderError: it cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save

        arrays = {name: getattr(self, name) for name in _ARRAYS}
        header = {
            "format_version": FORMAT_VERSION,
            "old": to_plain(self.old),
            "new": to_plain(self.new),
            "record": self.record,
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                # save_file would make it unreadable for other users
                temporary.write_bytes(save(arrays, {"cooccurrence": json.dumps(header)}))
        except (OSError, SafetensorError) as error:
            raise OutputFolderError(
                f"{path} cannot be written ({error}); make room, or name another file."
            ) from error

    @classmethod
    def load(cls, path: Path) -> Cooccurrence:
        """Reads and checks a file.

        Raises:
            DatasetError: it is missing, damaged, or something else.
        """
        from safetensors import SafetensorError, safe_open

        header = read_header(path)
        try:
            with safe_open(path, "numpy") as file:
                arrays = {name: file.get_tensor(name) for name in _ARRAYS}
        except (SafetensorError, OSError) as error:
            raise DatasetError(f"{path} is damaged ({error}); write it again.") from error
        loaded = cls(
            from_plain(TokenizerInfo, header.get("old"), str(path)),
            from_plain(TokenizerInfo, header.get("new"), str(path)),
            record=header.get("record", {}),
            **arrays,
        )
        loaded._check(path)
        return loaded

    def _check(self, path: Path) -> None:
        sizes = {len(self.new_tokens), len(self.old_tokens), len(self.volumes)}
        ranges = (
            (self.new_tokens, self.new.vocab_size),
            (self.old_tokens, self.old.vocab_size),
        )
        fits = len(sizes) == 1 and self.occurrences.shape == (self.new.vocab_size,)
        fits = fits and all(len(t) and t.min() >= 0 and t.max() < size for t, size in ranges)
        keys = (
            self.new_tokens.astype(np.int64) * self.old.vocab_size + self.old_tokens if fits else 0
        )
        if not fits or not (np.diff(keys) > 0).all() or not (self.volumes > 0).all():
            raise DatasetError(f"{path} is damaged: its parts do not fit; write it again.")


def read_header(path: Path) -> dict[str, Any]:
    """Everything of a file but the arrays.

    Raises:
        DatasetError: it is missing, damaged, or something else.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DatasetError(
            f"{path} does not exist; write it with python -m cosmos_posttrain.transfer."
        )
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {})["cooccurrence"])
        version = header["format_version"]
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise DatasetError(
            f"{path} is no co-occurrence file; write one with python -m cosmos_posttrain.transfer."
        ) from error
    if version != FORMAT_VERSION:
        raise DatasetError(
            f"{path} has format_version {version}, this program reads {FORMAT_VERSION}; write it "
            "again."
        )
    assert isinstance(header, dict)
    return header
