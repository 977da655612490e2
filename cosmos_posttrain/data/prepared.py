"""A folder that this program prepared: shards, their sidecars and the manifest.

Flows in: a folder with a manifest. Flows out: its shards, compared with the manifest as far as that
is cheap (see ``recorded.py``). ``python -m cosmos_posttrain.data verify`` compares everything.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain.data.indexed import ShardReader
from cosmos_posttrain.data.layout import EXTENSIONS, MANIFEST_FILE, STATES_EXTENSION
from cosmos_posttrain.data.limits import naming_limits
from cosmos_posttrain.data.manifest import DocumentRow, Manifest
from cosmos_posttrain.data.prompts import PromptShards
from cosmos_posttrain.data.recorded import RecordedShards
from cosmos_posttrain.data.serial import from_plain
from cosmos_posttrain.data.shards import ShardSet
from cosmos_posttrain.data.source_runs import SourceRuns, load_runs, parse_rows, runs_of_sidecars
from cosmos_posttrain.data.threads import mapped
from cosmos_posttrain.errors import DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


class PreparedShards(RecordedShards, ShardSet):
    """The shards of a prepared folder.

    Attributes:
        prompts: the embeddings of its prompts; None for base data.

    Raises:
        DatasetError: the manifest or a shard is missing, damaged or incomplete.
    """

    manifest: Manifest

    def __init__(self, folder: Path) -> None:
        self.manifest = Manifest.load(folder)
        self.fingerprint = self.manifest.fingerprint
        self.seq_length = self.manifest.contract.seq_length
        self._rows: tuple[int, list[dict[str, Any]]] = (-1, [])
        self._prompt_numbers: NDArray[np.uint32] | None = None
        self._check_table(folder)
        super().__init__(folder, self.manifest.shards)
        self.prompts: PromptShards | None = None
        if self.manifest.contract.text_encoder is not None:
            self.prompts = PromptShards(folder, self.manifest)

    def _check_table(self, folder: Path) -> None:
        """Refuses a manifest whose files do not go with its documents."""
        table = self.manifest.shards
        absent = np.full(len(table), -1)
        sizes = {e: table.files[e].num_bytes if e in table.files else absent for e in EXTENSIONS}
        token_bytes = np.dtype(self.manifest.contract.dtype).itemsize * self.seq_length
        fits = (table.num_documents == 0) | (sizes["bin"] == table.num_documents * token_bytes)
        for column in sizes.values():
            fits &= (column >= 0) == (table.num_documents > 0)
        if not fits.all():
            raise DatasetError(
                f"{folder / MANIFEST_FILE} is damaged: the files of "
                f"{table.name(int(np.argmin(fits)))} do not go with its documents; prepare the "
                "data set again."
            )

    def _check(self, shard: int, reader: ShardReader) -> None:
        super()._check(shard, reader)
        recorded = int(self.manifest.shards.num_documents[shard])
        if len(reader) != recorded or (reader.lengths != self.seq_length).any():
            raise DatasetError(
                f"{reader.prefix} is damaged: its index does not have {recorded} documents of "
                f"{self.seq_length} tokens; prepare the data set again."
            )

    def row(self, document: int) -> DocumentRow:
        shard, number = self.locate(document)
        held, rows = self._rows
        if held != shard:
            path, data, num_documents = self._read_sidecar(shard)
            rows = parse_rows(data, path, num_documents)
            self._rows = shard, rows
        row = from_plain(DocumentRow, rows[number], str(self.path(shard, "jsonl")))
        if self.prompts is not None and row.prompt_number is not None:
            row = dataclasses.replace(row, prompt=self.prompts.text(row.prompt_number))
        return row

    def source_runs(self) -> SourceRuns:
        runs = load_runs(self.folder, self.fingerprint, len(self))
        if runs is None:
            counts = self.manifest.shards.num_documents
            runs = runs_of_sidecars(mapped(self._read_sidecar, np.flatnonzero(counts).tolist()))
        return runs

    def states(self, document: int) -> NDArray[np.float32] | None:
        if STATES_EXTENSION not in self.manifest.shards.files:
            return None
        shard, number = self.locate(document)
        path = self.path(shard, STATES_EXTENSION)
        width, num_frames = (
            self.manifest.plan["state_width"],
            self.manifest.contract.clip.num_frames,
        )
        try:
            with naming_limits(str(path)):
                self._check_size(shard, STATES_EXTENSION, path.stat().st_size)
                count, first = num_frames * width, 4 * number * num_frames * width
                values = np.fromfile(path, "<f4", count, offset=first)
        except OSError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error
        return values.reshape(-1, width)

    def text_rows(self, document: int) -> Tensor | None:
        if self.prompts is None:
            return None
        if self._prompt_numbers is None:
            self._prompt_numbers = self.prompts.checked_numbers(self.source_runs(), len(self))
        return self.prompts.rows(int(self._prompt_numbers[document]))
