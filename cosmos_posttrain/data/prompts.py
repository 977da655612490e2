"""Embeddings of the prompts of a Video2World data set, each distinct prompt once.

Flows in: a prepared folder. Flows out: a prompt's rows, (length, width), and its text. Documents of
the clips' shards name prompts by number; shard and document are ``divmod(number, 1024)``.

    prompts-00000.bin/.idx  one document a prompt: its rows, flattened; uint16 (bfloat16) or float32
    prompts-00000.jsonl     one row a prompt: its text, and its number of tokens before it was cut
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.data.indexed import ShardReader
from cosmos_posttrain.data.layout import MANIFEST_FILE, PROMPTS_PER_SHARD
from cosmos_posttrain.data.manifest import Manifest
from cosmos_posttrain.data.recorded import RecordedShards
from cosmos_posttrain.data.serial import from_plain
from cosmos_posttrain.data.source_runs import SourceRuns
from cosmos_posttrain.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class PromptRow:
    """One line of a prompt shard's sidecar.

    Attributes:
        prompt: the text.
        num_tokens: how many it has; more than its rows where it was cut.
    """

    prompt: str
    num_tokens: int


class PromptShards(RecordedShards):
    """The prompts of a prepared folder.

    Raises:
        DatasetError: a file is missing or damaged.
    """

    holds_floats = True

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        text, context_len = manifest.contract.text_encoder, manifest.contract.context_len
        assert text is not None and context_len is not None
        self.encoder, self.context_len = text, context_len
        self._texts: tuple[int, list[str]] = (-1, [])
        super().__init__(folder, manifest.prompts)
        if (self.table.num_documents[:-1] != PROMPTS_PER_SHARD).any():
            raise self._damaged(folder / MANIFEST_FILE, "a prompt shard is not full")

    @staticmethod
    def _damaged(what: object, why: str) -> DatasetError:
        return DatasetError(f"{what} is damaged: {why}; prepare the data set again.")

    def _check(self, shard: int, reader: ShardReader) -> None:
        super()._check(shard, reader)
        rows, rest = np.divmod(reader.lengths, self.encoder.width)
        fits = len(reader) == int(self.table.num_documents[shard])
        if not fits or rest.any() or rows.min() < 1 or rows.max() > self.context_len:
            raise self._damaged(
                reader.prefix,
                f"its prompts do not have 1 to {self.context_len} rows of {self.encoder.width}",
            )

    def rows(self, number: int) -> Tensor:
        """A prompt's embedding, (length, width), in the dtype that it is stored in.

        Raises:
            DatasetError: the shard is missing or damaged.
        """
        from cosmos_posttrain.text.rows import STORED_DTYPES, unpack_rows

        stored = self.tokens(number)
        if stored.dtype.name != STORED_DTYPES[self.encoder.dtype]:
            raise self._damaged(self.where(number), f"it holds {stored.dtype.name}")
        return unpack_rows(stored.copy(), self.encoder.width, self.encoder.dtype)

    def text(self, number: int) -> str:
        """A prompt's text.

        Raises:
            DatasetError: the sidecar is missing or damaged.
        """
        shard, document = self.locate(number)
        held, texts = self._texts
        if held != shard:
            texts = self._read_texts(shard)
            self._texts = shard, texts
        return texts[document]

    def _read_texts(self, shard: int) -> list[str]:
        path, data, num_prompts = self._read_sidecar(shard)
        try:
            rows: list[Any] = [json.loads(line) for line in data.splitlines()]
        except ValueError as error:
            raise self._damaged(path, str(error)) from error
        if len(rows) != num_prompts:
            raise self._damaged(path, f"it has {len(rows)} rows, the manifest says {num_prompts}")
        return [from_plain(PromptRow, row, str(path)).prompt for row in rows]

    def checked_numbers(self, runs: SourceRuns, num_documents: int) -> NDArray[np.uint32]:
        """The number of each document's prompt, (num_documents,).

        Raises:
            DatasetError: they are missing, or name prompts that are not there.
        """
        numbers = runs.prompt_numbers
        if len(numbers) != num_documents or (numbers >= len(self)).any():
            raise self._damaged(self.folder, "not every clip names one of its prompts")
        return numbers
