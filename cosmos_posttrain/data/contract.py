"""The contract of a data set: what all its documents share. No torch.

Flows in: the tokenizer's identity and the clip's geometry. Flows out: a ``Contract``, which goes
typed from the manifest to the checkpoint and back; training, inference and evaluation check it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cosmos_posttrain.data.serial import to_plain
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.geometry import ClipGeometry, Compression, LatentShape

FORMAT_VERSION = 1
KINDS = ("base", "video2world")
TEXT_DTYPES = ("bfloat16", "float32")  # of stored embeddings


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer made the tokens.

    Attributes:
        id: the path or name as it was given; says nothing certain.
        sha256: of the encoder's learned tensors; this is the identity. "" where the tokens came
            without it, then the rest is compared.
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
class TextEncoderInfo:
    """Which text encoder made the embeddings of the prompts.

    Attributes:
        id: the path or name as it was given; says nothing certain.
        sha256: of its tensors; this is the identity.
        width: numbers in a row.
        dtype: in which rows are stored, ``bfloat16`` or ``float32``.
    """

    id: str
    sha256: str
    width: int
    dtype: str


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
        context_len: rows of a prompt's embedding, padding counted in; None without prompts.
    """

    format_version: int
    kind: str
    tokenizer: TokenizerInfo
    clip: ClipInfo
    latent_shape: tuple[int, ...]
    seq_length: int
    dtype: str
    text_encoder: TextEncoderInfo | None = None
    context_len: int | None = None

    @property
    def geometry(self) -> ClipGeometry:
        """The clip before and after the tokenizer."""
        clip = self.clip
        rate = Compression(*self.tokenizer.compression)
        return ClipGeometry(clip.num_frames, clip.height, clip.width, rate)

    def problem(self) -> str | None:
        """How the parts contradict one another, in words; None if they do not."""
        if self.format_version != FORMAT_VERSION:
            return f"its format_version is {self.format_version}, this program reads 1"
        if self.kind not in KINDS:
            return f"its kind is {self.kind!r}, which must be one of {', '.join(KINDS)}"
        if len(self.latent_shape) != 3 or min(self.latent_shape) < 1:
            return f"its latent_shape is {list(self.latent_shape)}"
        if LatentShape(*self.latent_shape).num_tokens != self.seq_length:
            return f"latent_shape {list(self.latent_shape)} is not {self.seq_length} tokens"
        if len(self.tokenizer.compression) != 3:
            return f"its compression is {list(self.tokenizer.compression)}"
        if self.dtype not in ("uint16", "int32"):
            return f"its dtype is {self.dtype!r}"
        return self._text_problem()

    def _text_problem(self) -> str | None:
        text, rows = self.text_encoder, self.context_len
        if len({self.kind == "video2world", text is not None, rows is not None}) > 1:
            return "its kind, text_encoder and context_len do not go together"
        if text is not None and (text.width < 1 or rows is None or rows < 1):
            return f"its text embeddings have {rows} rows of {text.width} numbers"
        if text is not None and text.dtype not in TEXT_DTYPES:
            return f"its text embeddings are {text.dtype!r}"
        return None

    def check(self, where: str) -> None:
        """Raises DatasetError if the parts contradict one another; ``where`` names the file."""
        if problem := self.problem():
            raise DatasetError(f"{where} is damaged or foreign: {problem}; prepare it again.")

    def difference(self, other: Contract) -> str | None:
        """The first thing that ``other`` has otherwise, in words; None if they are the same.

        Ids may differ: the same weights have many names.
        """
        ours, theirs = _flat(self), _flat(other)
        for name in ("tokenizer id", "text_encoder id"):
            ours.pop(name, None)
        for key, value in ours.items():
            if theirs.get(key) != value:
                return f"{key} {value} here, {theirs.get(key)} there"
        return None


def _flat(contract: Contract) -> dict[str, Any]:
    """Every field by name, those of parts with the part's name before it."""
    flat: dict[str, Any] = {}
    for name, value in to_plain(contract).items():
        if isinstance(value, dict):
            flat |= {f"{name} {key}": item for key, item in value.items()}
        else:
            flat[name] = value
    return flat


def make_contract(
    tokenizer: TokenizerInfo,
    geometry: ClipGeometry,
    dtype: str,
    text_encoder: TextEncoderInfo | None = None,
    context_len: int | None = None,
) -> Contract:
    """A contract with the derived fields filled in; of a base data set without a text encoder."""
    clip = ClipInfo(geometry.num_frames, geometry.height, geometry.width)
    shape = tuple(geometry.latent_shape)
    kind = KINDS[text_encoder is not None]
    return Contract(
        FORMAT_VERSION,
        kind,
        tokenizer,
        clip,
        shape,
        geometry.seq_length,
        dtype,
        text_encoder,
        context_len,
    )
