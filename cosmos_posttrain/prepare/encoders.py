"""The encoders of a preparation, each loaded where and when it has something to do.

Flows in: the settings, and encoders that the caller has already. Flows out: what the contract and
the plan say of each, and the encoder itself when its turn comes:

    rank 0: which tokenizer, which text encoder -> ranks with prompts: the text encoder, then closed
    -> ranks with clips: the tokenizer

Never two in memory: a T5 of 11 billion parameters leaves little room beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from cosmos_posttrain.data.contract import Contract, TextEncoderInfo, TokenizerInfo
from cosmos_posttrain.errors import TextError, TokenizerError
from cosmos_posttrain.geometry import Compression, parse_compression
from cosmos_posttrain.prepare.config import PrepareConfig
from cosmos_posttrain.prepare.shard_job import ClipEncoder

if TYPE_CHECKING:
    from cosmos_posttrain.text import TextEncoder


@dataclass(frozen=True)
class TokenizerFacts:
    """What of a tokenizer decides the result."""

    info: TokenizerInfo
    plan: dict[str, str]


@dataclass(frozen=True)
class TextFacts:
    """Likewise, of a text encoder."""

    info: TextEncoderInfo
    context_len: int
    plan: dict[str, Any]


class PreparationEncoders:
    """The tokenizer and, for Video2World data, the text encoder.

    Args:
        config: the settings.
        tokenizer: used instead of loading ``encoder_path``.
        text_encoder: used instead of loading ``text_encoder_path``.
    """

    def __init__(
        self,
        config: PrepareConfig,
        tokenizer: ClipEncoder | None = None,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder

    @property
    def has_text(self) -> bool:
        """Whether prompts are encoded."""
        return self._config.text_encoder_path is not None

    def tokenizer(self) -> ClipEncoder:
        """The tokenizer, loaded if it is not.

        Raises:
            TokenizerError: it cannot be loaded, or has another compression than the settings say.
        """
        if self._tokenizer is not None:
            return self._tokenizer
        from cosmos_posttrain.tokenizer import load_tokenizer_pair

        config = self._config
        encoder: ClipEncoder = load_tokenizer_pair(
            config.encoder_path,
            config.decoder_path or config.encoder_path,
            config.tokenizer_compression_factor,
            config.device,
            config.dtype,
        )
        return encoder

    def tokenizer_facts(self) -> TokenizerFacts:
        """Which tokenizer it is; it stays loaded only if no text encoder comes before it.

        Raises:
            TokenizerError: see ``tokenizer``.
        """
        encoder = self.tokenizer()
        wanted = parse_compression(self._config.tokenizer_compression_factor)
        if tuple(encoder.compression) != tuple(wanted):
            raise TokenizerError(
                f"the tokenizer {encoder.id} compresses by "
                f"{Compression(*encoder.compression).name}, but tokenizer_compression_factor is "
                f"{wanted}; make them agree."
            )
        info = TokenizerInfo(
            encoder.id,
            encoder.sha256,
            tuple(encoder.compression),
            tuple(encoder.levels),
            encoder.vocab_size,
        )
        plan = _where("encoder", encoder.device, encoder.dtype)
        if not self.has_text:
            self._tokenizer = encoder
        elif encoder.device.type == "cuda" and self._tokenizer is None:
            del encoder
            torch.cuda.empty_cache()
        return TokenizerFacts(info, plan)

    def text_facts(self, earlier: Contract | None, is_needed: bool) -> TextFacts:
        """Which text encoder it is.

        Args:
            earlier: of the data set that the folder holds already.
            is_needed: whether there are prompts to encode for sure, so that it is loaded; else
                its weights are only hashed, one tensor at a time, or not even that where its name
                tells that they are those of ``earlier``.

        Raises:
            TextError: it cannot be read.
        """
        from cosmos_posttrain.text import identify_text_encoder

        config = self._config
        assert config.text_encoder_path is not None
        if self._text_encoder is None and is_needed:
            self._load_text_encoder()
        encoder: Any = self._text_encoder
        if encoder is None:
            known = earlier.text_encoder if earlier is not None else None
            encoder = identify_text_encoder(
                config.text_encoder_path,
                config.device,
                config.text_encoder_dtype,
                {} if known is None else {known.id: known.sha256},
            )
        info = TextEncoderInfo(encoder.id, encoder.sha256, encoder.width, config.embedding_dtype)
        plan = {
            "text_encoder_batch_size": config.text_encoder_batch_size,
            **_where("text_encoder", encoder.device, encoder.dtype),
        }
        return TextFacts(info, encoder.context_len, plan)

    def text_encoder(self, info: TextEncoderInfo) -> TextEncoder:
        """The text encoder, loaded if it is not.

        Raises:
            TextError: it cannot be loaded, or is another one than rank 0 found.
        """
        encoder = self._text_encoder or self._load_text_encoder()
        if encoder.sha256 != info.sha256:
            raise TextError(
                f"the text encoder {encoder.id} is not the one that process 1 found under that "
                "name; give all processes the same files."
            )
        return encoder

    def _load_text_encoder(self) -> TextEncoder:
        from cosmos_posttrain.text import load_text_encoder

        config = self._config
        assert config.text_encoder_path is not None
        self._text_encoder = load_text_encoder(
            config.text_encoder_path, config.device, config.text_encoder_dtype
        )
        return self._text_encoder

    def close_text_encoder(self) -> None:
        """Frees the text encoder if it is loaded."""
        if self._text_encoder is not None:
            self._text_encoder.close()


def _where(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Rounding depends on these."""
    return {
        f"{name}_device": device.type,
        f"{name}_dtype": str(dtype).removeprefix("torch."),
    }
