"""Prompts to what a Video2World model attends to, with the numbers that it was trained on.

Flows in: prompts, and which text encoder the model knows. Flows out: contexts (1, context_len,
width). Nothing behind it asks where a context came from.

A prompt is encoded alone, so that its context does not depend on what else a run asks for, and
rounded to the dtype in which the training data stored it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain import hub, launch
from cosmos_posttrain.data.contract import TextEncoderInfo
from cosmos_posttrain.errors import TextError
from cosmos_posttrain.inference import contract as contracts
from cosmos_posttrain.text import SHIPPED
from cosmos_posttrain.text.loading import load_text_encoder, open_source
from cosmos_posttrain.text.rows import pad_rows
from cosmos_posttrain.text.text_encoder import TextEncoder, say_cut

# Prompts whose rows are kept, beside those that were asked for in advance.
_MAX_KEPT = 64


@dataclass(frozen=True)
class TextEncoderChoice:
    """Which text encoder a session loads, and what of it a model takes.

    Attributes:
        path: as ``load_text_encoder`` takes it; None where nobody has named one.
        is_recorded: whether the checkpoint names it, and not the user.
        trained: which one it must be; None takes any.
        computed_dtype: in which it computes; None as ``load_text_encoder`` has it.
        stored_dtype: in which the training data stored its rows; None where that is not known.
        context_len: rows of a context.
        width: numbers in a row.
    """

    path: str | None
    is_recorded: bool
    trained: TextEncoderInfo | None
    computed_dtype: str | None
    stored_dtype: str | None
    context_len: int
    width: int

    def settings(self) -> dict[str, Any]:
        """What determines a context, apart from the prompt."""
        return {
            "id": self.path,
            "sha256": None if self.trained is None else self.trained.sha256,
            "dtype": self.computed_dtype,
            "stored_dtype": self.stored_dtype,
        }

    def load(self) -> TextEncoder:
        """Reads it onto this process's device, after a look at its size.

        Raises:
            TextError: it cannot be loaded, or is not the model's.
        """
        if self.path is None:
            raise TextError(
                f"the model takes texts of {self.context_len} rows of {self.width} numbers and "
                "does not say which text encoder makes them; name it with --text_encoder_path."
            )
        if self.is_recorded and not _is_somewhere(self.path):
            raise TextError(
                f"the checkpoint was trained on texts of {self.path}, which is not here; give that "
                "text encoder with --text_encoder_path."
            )
        source = open_source(self.path)
        contracts.check_text_size(
            self.context_len,
            self.width,
            source.id,
            source.context_len,
            source.model.config.d_model,
        )
        encoder = load_text_encoder(self.path, launch.device(), self.computed_dtype)
        if self.trained is not None:
            contracts.check_text_encoder(self.trained, encoder.id, encoder.sha256)
        return encoder


def _is_somewhere(path: str) -> bool:
    return path in SHIPPED or Path(path).exists() or hub.looks_like_hub_id(path)


class TextConditioner:
    """Makes contexts of prompts; the only owner of the text encoder, which it loads when needed.

    Args:
        choice: which text encoder.
        frees: whether to free the encoder after each use.

    Attributes:
        identity: id and sha256 of the encoder, once it was loaded.
    """

    def __init__(self, choice: TextEncoderChoice, frees: bool) -> None:
        self.choice = choice
        self.identity: dict[str, str] | None = None
        self._frees = frees
        self._encoder: TextEncoder | None = None
        self._rows: dict[str, Tensor] = {}

    def encode(
        self,
        prompts: Sequence[str],
        others: Sequence[str] = (),
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Encodes each distinct prompt once, and keeps its rows in place of older ones.

        Args:
            prompts: texts.
            others: texts that other processes encode, of which this one warns where they are cut.
            progress: called with the number of prompts encoded so far, after each.

        Raises:
            TextError: the encoder cannot be loaded, is not the model's, or fails.
        """
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        if missing:
            encoder = self._get()
            tokens = encoder.tokenize(list(dict.fromkeys([*missing, *others])))
            say_cut(tokens)
            for number, item in enumerate(tokens[: len(missing)], 1):
                rows = encoder.encode_tokens([item])[0]
                self._rows[item.prompt] = rows.to("cpu", self._stored_dtype(rows))
                if progress is not None:
                    progress(number)
            if self._frees:
                self.free()
        for prompt in dict.fromkeys(prompts):  # what was asked for last is dropped last
            self._rows[prompt] = self._rows.pop(prompt)
        for prompt in list(self._rows)[: -max(_MAX_KEPT, len(set(prompts)))]:
            del self._rows[prompt]

    def context(self, prompt: str | None) -> Tensor:
        """A prompt's context, (1, context_len, width) float32 on the CPU; None is the null context.

        Raises:
            TextError: see ``encode``.
        """
        if prompt is None:
            return self.padded(torch.zeros(0, self.choice.width))
        if prompt not in self._rows:
            self.encode([prompt])
        return self.padded(self._rows[prompt])

    def padded(self, rows: Tensor) -> Tensor:
        """Rows (length, width) with zero rows behind them, (1, context_len, width) float32."""
        return pad_rows([rows.float().cpu()], self.choice.context_len)

    def free(self) -> None:
        """Frees the encoder; it is loaded again when it is needed."""
        if self._encoder is not None:
            self._encoder.close()
        self._encoder = None

    def _get(self) -> TextEncoder:
        if self._encoder is None:
            self._encoder = self.choice.load()
            self.identity = {"id": self._encoder.id, "sha256": self._encoder.sha256}
        return self._encoder

    def _stored_dtype(self, rows: Tensor) -> torch.dtype:
        return launch.parse_dtype(self.choice.stored_dtype) or rows.dtype
