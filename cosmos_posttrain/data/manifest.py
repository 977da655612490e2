"""The manifest: what a prepared folder holds, as a contract that training and inference check.

Flows in: the tokenizer's identity, the clip's geometry, the shards and the failures. Flows out:
``manifest.json``, written last: a folder is complete exactly when it has one.

Files of a folder:
  manifest.json       contract, shards (names, sizes, sha256, counts), the first failures
  shard-00000.bin/.idx  tokens, one document a clip, in Megatron's indexed format
  shard-00000.jsonl   one row a document: where the clip came from
  failures.jsonl      one row for each video that could not be read
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cosmos_posttrain.data.files import (
    MANIFEST_FILE,
    PLAN_FILE,
    read_json,
    sha256_of_json,
    write_json,
)
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.geometry import Compression, LatentShape

FORMAT_VERSION = 1
MAX_LISTED_FAILURES = 1000
KINDS = ("base", "video2world")

T = TypeVar("T")


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the tokens.

    Attributes:
        id: the path or name as it was given; says nothing certain.
        sha256: of the encoder's learned tensors; this is the identity.
        compression: (T, H, W).
        levels: FSQ levels.
        vocab_size: their product.
    """

    id: str
    sha256: str
    compression: tuple[int, ...]
    levels: tuple[int, ...]
    vocab_size: int


@dataclass(frozen=True)
class ClipInfo:
    """Size of every clip, in frames and pixels."""

    num_frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Contract:
    """What all documents of a data set share, and what a model trained on it depends on.

    Attributes:
        format_version: of this file.
        kind: ``base`` or ``video2world``.
        tokenizer: which tokenizer made the tokens.
        clip: frames and pixels of a clip.
        latent_shape: (T, H, W) of the token grid.
        seq_length: tokens of a document, T * H * W.
        dtype: of the tokens on disk, ``uint16`` or ``int32``.
        text_encoder: of the prompts; None without prompts.
        context_len: rows of a prompt's embedding; None without prompts.
    """

    format_version: int
    kind: str
    tokenizer: TokenizerInfo
    clip: ClipInfo
    latent_shape: tuple[int, ...]
    seq_length: int
    dtype: str
    text_encoder: dict[str, Any] | None = None
    context_len: int | None = None

    def check(self, where: str) -> None:
        """Raises DatasetError if the parts contradict one another; ``where`` names the file."""
        problem = None
        if self.format_version != FORMAT_VERSION:
            problem = f"its format_version is {self.format_version}, this program reads 1"
        elif self.kind not in KINDS:
            problem = f"its kind is {self.kind!r}, which must be one of {', '.join(KINDS)}"
        elif len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            problem = f"its latent_shape is {list(self.latent_shape)}"
        elif LatentShape(*self.latent_shape).num_tokens != self.seq_length:
            problem = f"latent_shape {list(self.latent_shape)} is not {self.seq_length} tokens"
        elif len(self.tokenizer.compression) != 3:
            problem = f"its compression is {list(self.tokenizer.compression)}"
        elif self.dtype not in ("uint16", "int32"):
            problem = f"its dtype is {self.dtype!r}"
        if problem:
            raise DatasetError(f"{where} is damaged or foreign: {problem}; prepare it again.")

    def difference(self, other: Contract) -> str | None:
        """The first thing that ``other`` has otherwise, in words; None if they are the same.

        The tokenizer's id may differ: the same weights have many names.
        """
        ours, theirs = (
            {f"tokenizer {key}": value for key, value in plain.pop("tokenizer").items()}
            | {f"clip {key}": value for key, value in plain.pop("clip").items()}
            | plain
            for plain in (to_plain(self), to_plain(other))
        )
        ours.pop("tokenizer id")
        for key, value in ours.items():
            if theirs.get(key) != value:
                return f"{key} {value} here, {theirs.get(key)} there"
        return None


@dataclass(frozen=True)
class ShardInfo:
    """One shard: files by their extension, each with its size and hash.

    A shard of which no video could be read has no files.
    """

    name: str
    num_documents: int
    num_sources: int
    files: dict[str, dict[str, Any]]


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
        prompt: None without one.
    """

    document: int
    source: str
    first_frame: int = 0
    stride: int = 1
    num_repeated: int = 0
    fps: float = 0.0
    prompt: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The row without an absent prompt."""
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
    """

    contract: Contract
    plan: dict[str, Any]
    num_documents: int
    num_failures: int
    failures: tuple[Failure, ...]
    shards: tuple[ShardInfo, ...]

    @property
    def fingerprint(self) -> str:
        """Hash of the contract and of every shard's: equal only for equal data."""
        files = [{k: f["sha256"] for k, f in shard.files.items()} for shard in self.shards]
        return sha256_of_json({"contract": to_plain(self.contract), "shards": files})

    def save(self, folder: Path) -> None:
        """Writes ``manifest.json`` atomically: from then on the folder is complete."""
        write_json(folder / MANIFEST_FILE, to_plain(self))

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
        manifest = from_plain(cls, read_json(path), str(path))
        manifest.contract.check(str(path))
        if sum(shard.num_documents for shard in manifest.shards) != manifest.num_documents:
            raise DatasetError(
                f"{path} is damaged: its shards do not add up to num_documents; prepare it again."
            )
        return manifest


def to_plain(value: Any) -> Any:
    """A dataclass as dicts, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: to_plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[T], value: Any, where: str) -> T:
    """The inverse of ``to_plain``; unknown keys are ignored, missing and mistyped ones refused.

    Raises:
        DatasetError: names ``where`` and the field.
    """
    return typing.cast(T, _read(kind, value, where, kind.__name__))


def _read(kind: Any, value: Any, where: str, name: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints = typing.get_type_hints(kind)
        required = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
        missing = sorted(required - value.keys())
        if missing:
            raise DatasetError(f"{where} is damaged: it has no {missing[0]}.")
        return kind(**{k: _read(hints[k], v, where, k) for k, v in value.items() if k in hints})
    if origin in (typing.Union, types.UnionType):
        chosen = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _read(chosen[0], value, where, name)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], item, where, name) for item in value)
    if origin is dict and isinstance(value, dict):
        return value
    plain = origin or kind
    if plain is float and type(value) is int:
        return float(value)
    if isinstance(plain, type) and type(value) is plain:
        return value
    raise DatasetError(f"{where} is damaged: {name} is {value!r}.")


def make_contract(tokenizer: TokenizerInfo, clip: ClipInfo, dtype: str) -> Contract:
    """A base contract with the derived fields filled in; the geometry was checked before."""
    from cosmos_posttrain.geometry import ClipGeometry

    geometry = ClipGeometry(
        clip.num_frames, clip.height, clip.width, Compression(*tokenizer.compression)
    )
    shape = tuple(geometry.latent_shape)
    return Contract(FORMAT_VERSION, "base", tokenizer, clip, shape, geometry.seq_length, dtype)
