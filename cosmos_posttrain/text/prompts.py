"""Prompts to token numbers, and what is left out of those that are too long.

Flows in: prompts, and the tokenizer of an encoder's folder (``tokenizer.json``, or T5's own
``spiece.model``). Flows out: for each prompt its numbers, the last of them ``</s>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain.errors import TextError
from cosmos_posttrain.text.packages import package

TOKENIZER_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "spiece.model"

_SHOWN_CHARACTERS = 60
_SHOWN_WORDS = 6


@dataclass(frozen=True)
class PromptTokens:
    """One prompt as an encoder takes it.

    Attributes:
        prompt: the text.
        ids: numbers of its tokens and of ``</s>``, at most ``context_len`` of them.
        num_tokens: how many there would be without that limit.
        cut_at: the character from which on the text is left out; None if nothing is.
    """

    prompt: str
    ids: tuple[int, ...]
    num_tokens: int
    cut_at: int | None = None

    def warning(self) -> str | None:
        """Says where the text was cut; None if it was not."""
        if self.cut_at is None:
            return None
        text = self.prompt
        word = self.cut_at  # or where the word begins that is cut in two
        while word and not text[word - 1].isspace():
            word -= 1
        words = text[word:].split(maxsplit=_SHOWN_WORDS)[:_SHOWN_WORDS]
        return (
            f"the prompt {shown(text)} has {self.num_tokens} tokens, but the text encoder "
            f"takes {len(self.ids)}; it is cut from character {self.cut_at} on: "
            f"{shown(' '.join(words) + ' ...')}."
        )


def shown(text: str) -> str:
    """A text in quotes, shortened to fit into a sentence."""
    if len(text) > _SHOWN_CHARACTERS:
        text = text[: _SHOWN_CHARACTERS - 4] + " ..."
    return ascii(text) if not text.isprintable() else f'"{text}"'


def prompt_problem(prompt: object) -> str | None:
    """Why something cannot be a prompt, as the end of a sentence; None if it can."""
    if not isinstance(prompt, str):
        return f"is a {type(prompt).__name__}; a prompt is a text"
    if not prompt.strip():
        return "is empty; write what is to be seen"
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        return f"is {shown(prompt)}, with half a character at place {error.start}; write UTF-8"
    return None


class PromptTokenizer:
    """Tokenizes prompts as transformers does with the same files.

    Args:
        tokenizer: a ``tokenizers.Tokenizer``.
        context_len: most tokens of a prompt, ``</s>`` counted in.
        end_token: the number of ``</s>``.
    """

    def __init__(self, tokenizer: Any, context_len: int, end_token: int) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._context_len = context_len
        self._end_token = end_token

    @property
    def vocab_size(self) -> int:
        """Numbers that it may give."""
        return int(self._tokenizer.get_vocab_size())

    def to_json(self) -> str:
        """The contents of a ``tokenizer.json``."""
        return str(self._tokenizer.to_str())

    def __call__(self, prompts: Sequence[str]) -> list[PromptTokens]:
        """Tokenizes prompts.

        Raises:
            TextError: one is no text, or empty; the sentence names it.
        """
        if isinstance(prompts, str):
            raise TextError("prompts come as a list; put the one prompt into brackets.")
        for number, prompt in enumerate(prompts, 1):
            if problem := prompt_problem(prompt):
                raise TextError(f"prompt {number} of {len(prompts)} {problem}.")
        return [self._one(prompt) for prompt in prompts]

    def _one(self, prompt: str) -> PromptTokens:
        # One at a time: batches would start threads, which do not survive a later fork.
        encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
        ids, limit = encoding.ids, self._context_len - 1
        cut_at = encoding.offsets[limit][0] if len(ids) > limit else None
        kept = (*ids[:limit], self._end_token)
        return PromptTokens(prompt, kept, len(ids) + 1, cut_at)


def read_tokenizer(folder: Path, context_len: int, end_token: int) -> PromptTokenizer:
    """The tokenizer of an encoder's folder.

    Raises:
        TextError: there is none, or it cannot be read.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        path = folder / SENTENCEPIECE_FILE
    if not path.is_file():
        raise TextError(
            f"{folder} holds no tokenizer; put the {TOKENIZER_FILE} or {SENTENCEPIECE_FILE} of the "
            "text encoder there."
        )
    try:
        if path.name == TOKENIZER_FILE:
            tokenizer = package("tokenizers").Tokenizer.from_file(str(path))
        else:
            tokenizer = _from_sentencepiece(folder)
    except TextError:
        raise
    except Exception as error:  # tokenizers raises plain Exceptions
        first_line = str(error).strip().partition("\n")[0]
        raise TextError(
            f"{path} is not a readable tokenizer ({first_line}); copy or download it again."
        ) from error
    return PromptTokenizer(tokenizer, context_len, end_token)


def _from_sentencepiece(folder: Path) -> Any:
    """T5's own file, which transformers translates."""
    package("sentencepiece")
    package("google.protobuf")
    fast = package("transformers").T5TokenizerFast
    return fast.from_pretrained(str(folder), local_files_only=True).backend_tokenizer
