"""The manifest: what a prepared folder holds, as a contract that training and inference check.

Flows in: the tokenizer's identity, the clip's geometry, the shards and the failures. Flows out:
``manifest.json``, written last: a folder is complete exactly when it has one.

Files of a folder:
  manifest.json       contract, shards (names, sizes, sha256, counts), the first failures
  shard-00000.bin/.idx  tokens, one document a clip, in Megatron's indexed format
  shard-00000.jsonl   one row a document: where the clip came from
  sources.npz         the source of every document, in one file (see ``source_runs.py``)
  failures.jsonl      one row for each video that could not be read
  prompts-00000.bin/.idx/.jsonl  embeddings of the distinct prompts (see ``prompts.py``)
  shard-00000.states/.segments  of robot data: float32 rows and an int32 segment for every frame
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.layout import MANIFEST_FILE, PLAN_FILE
from cosmos_posttrain.data.limits import naming_limits
from cosmos_posttrain.data.serial import from_plain, to_plain
from cosmos_posttrain.data.shard_table import ShardTable
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.files import json_text, read_json, replacing

MAX_LISTED_FAILURES = 1000
_NO_SHARDS = '\n  "shards": []'


@dataclass(frozen=True)
class Failure:
    """A video that could not be read, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class DocumentRow:
    """Where a document came from; one line of a shard's sidecar.

    Attributes:
        document: its number in the shard.
        source: the video, relative to the input folder or as the jsonl file has it.
        first_frame: number of the clip's first frame in the video.
        stride: distance between the clip's frames, in frames of the video.
        num_repeated: frames at the clip's end that repeat the last one.
        fps: of the video; 0.0 where unknown.
        prompt: None without one; in a Video2World data set the prompts' own shards hold it.
        prompt_number: of the embedding there; None in a base data set.
        unserved: why the document is stored but belongs to no split, in a few words; else None.
    """

    document: int
    source: str
    first_frame: int = 0
    stride: int = 1
    num_repeated: int = 0
    fps: float = 0.0
    prompt: str | None = None
    prompt_number: int | None = None
    unserved: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The row without what is absent."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Manifest:
    """A complete data set.

    Attributes:
        contract: what all documents share.
        plan: what was prepared from what: settings, number of videos and their hash.
        num_documents: over all shards.
        num_failures: videos that could not be read; all of them are in ``failures.jsonl``.
        failures: the first 1,000 of them.
        shards: in order.
        rejected: videos that a filter left out, counted by reason; no failures.
        prompts: the prompts' shards, in order; none without a text encoder.
        num_unserved: documents that are stored but belong to no split.
    """

    contract: Contract
    plan: dict[str, Any]
    num_documents: int
    num_failures: int
    failures: tuple[Failure, ...]
    shards: ShardTable
    rejected: dict[str, int] = field(default_factory=dict)
    prompts: ShardTable = field(default_factory=ShardTable)
    num_unserved: int = 0

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the contract and of every shard's: equal only for equal data."""
        contract = json.dumps(to_plain(self.contract), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(f'{{"contract":{contract},"shards":['.encode())
        self.shards.update_hash(digest)
        if len(self.prompts):
            digest.update(b'],"prompts":[')
            self.prompts.update_hash(digest)
        digest.update(b"]}")
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` atomically: from then on the folder is complete."""
        value = to_plain(dataclasses.replace(self, shards=ShardTable()))
        if not self.rejected:
            del value["rejected"]
        if not len(self.prompts):
            del value["prompts"]
        if not self.num_unserved:
            del value["num_unserved"]
        head, _, tail = json_text(value, indent=2).partition(_NO_SHARDS)
        with (
            replacing(folder / MANIFEST_FILE) as temporary,
            temporary.open("w", encoding="utf-8", newline="\n") as file,
        ):
            file.write(head + _NO_SHARDS[:-1])
            separator = "\n"
            for block in self.shards.json_blocks():
                file.write(separator + block)
                separator = ",\n"
            file.write(("\n  ]" if len(self.shards) else "]") + tail + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Reads and checks ``manifest.json``.

        Raises:
            DatasetError: it is missing, damaged, or of another format.
        """
        folder = Path(folder)
        path = folder / MANIFEST_FILE
        if not path.is_file():
            if (folder / PLAN_FILE).is_file():
                raise DatasetError(
                    f"{folder} is not complete: its preparation was stopped; run the same "
                    "prepare_dataset.py command again to finish it."
                )
            raise DatasetError(f"{folder} has no {MANIFEST_FILE}; name a prepared folder.")
        with naming_limits(str(path)):
            value = read_json(path, DatasetError, "prepare the data set again")
        for name in ("shards", "prompts"):
            if name in value:
                value[name] = ShardTable.read(value[name], str(path))
        manifest = from_plain(cls, value, str(path))
        contract = manifest.contract
        contract.check(str(path))
        if manifest.shards.num_documents.sum() != manifest.num_documents:
            raise DatasetError(
                f"{path} is damaged: its shards do not add up to num_documents; prepare it again."
            )
        has_prompts, has_text = bool(len(manifest.prompts)), contract.text_encoder is not None
        # Where every line failed, there may be clips or prompts without the others.
        if has_prompts != has_text and (has_prompts or manifest.num_documents):
            raise DatasetError(
                f"{path} is damaged: its prompts do not go with its text_encoder; prepare it again."
            )
        return manifest
