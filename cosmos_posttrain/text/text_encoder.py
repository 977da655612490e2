"""The text encoder as the rest of the project sees it.

Flows in: prompts. Flows out: the encoder's last hidden states, (length, width) for each prompt, or
(B, context_len, width) with zero rows behind each prompt's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.errors import ConfigError, TextError
from cosmos_posttrain.text.prompts import PromptTokenizer, PromptTokens, shown
from cosmos_posttrain.text.rows import pad_rows

DEFAULT_BATCH_SIZE = 8
_MAX_WARNINGS = 10


def say_cut(tokens: Sequence[PromptTokens]) -> None:
    """Warns of the prompts that are too long, and says where each is cut."""
    warnings = [warning for item in tokens if (warning := item.warning())]
    for warning in warnings[:_MAX_WARNINGS]:
        launch.say(f"warning: {warning}", error=True)
    if more := len(warnings[_MAX_WARNINGS:]):
        launch.say(f"warning: {more} more prompts are cut.", error=True)


class TextEncoder:
    """A T5 encoder with its tokenizer.

    Attributes:
        id: what the manifest records: the path or name as it was given, with the commit where that
            is known.
        sha256: of the encoder's tensors rounded to bfloat16; equal for equal weights in any file
            form.
        width: numbers in a row.
        context_len: most tokens of a prompt, and rows of a padded one.
        dtype: that it computes in.
        device: where it is.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PromptTokenizer,
        id: str,
        sha256: str,
        width: int,
        context_len: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self.id = id
        self.sha256 = sha256
        self.width = width
        self.context_len = context_len
        parameter = next(model.parameters())
        self.dtype: torch.dtype = parameter.dtype
        self.device: torch.device = parameter.device

    def tokenize(self, prompts: Sequence[str]) -> list[PromptTokens]:
        """The prompts' token numbers, and where those that are too long will be cut.

        Raises:
            TextError: a prompt is no text, or empty.
        """
        return self._tokenizer(prompts)

    def encode(self, prompts: Sequence[str], batch_size: int = DEFAULT_BATCH_SIZE) -> list[Tensor]:
        """Prompts -> the rows of each, as many as it has tokens.

        A prompt that comes several times is encoded once. One with more than ``context_len`` tokens
        is cut, with a warning that says where.

        Args:
            prompts: texts.
            batch_size: prompts that run at once; results differ by rounding at most.

        Returns:
            (length, width) each, on the encoder's device and in its dtype.

        Raises:
            TextError: a prompt is no text, or empty, or its embedding is not finite.
        """
        tokens = {item.prompt: item for item in self.tokenize(prompts)}
        say_cut(list(tokens.values()))
        found = self.encode_tokens(list(tokens.values()), batch_size)
        rows = dict(zip(tokens, found, strict=True))
        return [rows[prompt] for prompt in prompts]

    @torch.no_grad()
    def encode_tokens(
        self, tokens: Sequence[PromptTokens], batch_size: int = DEFAULT_BATCH_SIZE
    ) -> list[Tensor]:
        """As ``encode``, after ``tokenize``.

        Which prompts run together depends on the list alone: the longest first, so that memory
        runs out at once or not at all, and little is padded.

        Raises:
            TextError: an embedding is not finite.
            ConfigError: ``batch_size`` is below 1.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}, which must be at least 1.")
        order = sorted(range(len(tokens)), key=lambda number: -len(tokens[number].ids))
        rows: dict[int, Tensor] = {}
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [tokens[number] for number in numbers]
            for number, item, hidden in zip(numbers, batch, self._run(batch), strict=True):
                # A copy, so that no row holds on to its whole batch.
                rows[number] = hidden[: len(item.ids)].clone()
                if not rows[number].isfinite().all():
                    raise TextError(
                        f"the text encoder {self.id} makes values that are not finite of the "
                        f"prompt {shown(item.prompt)}; compute in another dtype."
                    )
        return [rows[number] for number in range(len(tokens))]

    def _run(self, batch: Sequence[PromptTokens]) -> Tensor:
        """(B, longest, width); what lies behind a prompt's own rows is without meaning."""
        assert self._model is not None, "the text encoder is closed"
        longest = max(len(item.ids) for item in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros(len(batch), longest, dtype=torch.long)
        for number, item in enumerate(batch):
            ids[number, : len(item.ids)] = torch.tensor(item.ids)
            mask[number, : len(item.ids)] = 1
        output = self._model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
        hidden: Tensor = output.last_hidden_state
        return hidden

    def embed(self, prompts: Sequence[str], batch_size: int = DEFAULT_BATCH_SIZE) -> Tensor:
        """Prompts -> (B, context_len, width), the ``context`` of a Video2World model.

        Raises:
            TextError: see ``encode``; or there is no prompt at all.
        """
        if len(prompts) == 0:
            raise TextError("there is no prompt to encode; give at least one.")
        return pad_rows(self.encode(prompts, batch_size), self.context_len)

    def to(self, device: str | torch.device) -> TextEncoder:
        """Moves the weights, to the CPU say while the world model runs; returns itself."""
        assert self._model is not None, "the text encoder is closed"
        target = launch.device(device)
        self._model.to(target)
        self._leave(target)
        return self

    def close(self) -> None:
        """Frees the weights: it can encode no more, but still says which encoder it was."""
        self._model = None
        self._leave(torch.device("cpu"))

    def _leave(self, target: torch.device) -> None:
        if self.device.type == "cuda" and target.type != "cuda":
            torch.cuda.empty_cache()
        self.device = target
