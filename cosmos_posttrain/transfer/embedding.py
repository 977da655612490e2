"""Rows for new tokens, made from a checkpoint's rows for old ones; docs/embedding_transfer.md.

Flows in: a checkpoint, the number of new tokens and, for ``aligned`` and ``omp``, the co-occurrence
of new and old tokens. Flows out: the checkpoint's weights in a built model of the new vocabulary,
with other input embeddings and output rows. Every rank makes the same rows and keeps its part.

    aligned    from the old tokens at the same place and time; see ``rows.py``
    omp        a few old tokens whose places together resemble the new one's; see ``pursuit.py``
    digits     what the old rows say of the digits of FSQ codes; see ``digits.py``
    mean       every row is the mean of the old ones, and a little noise
    reset      fresh rows, drawn as the model's own fresh weights are
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosmos_posttrain.checkpoint.source import CheckpointSource
from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.data.serial import to_plain
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.transfer.config import COOCCURRENCE_INITS
from cosmos_posttrain.transfer.cooccurrence import Cooccurrence
from cosmos_posttrain.transfer.digits import digit_rows
from cosmos_posttrain.transfer.pursuit import (
    pursued_input_rows,
    pursued_output_rows,
    sparse_combinations,
)
from cosmos_posttrain.transfer.rows import aligned_input_rows, aligned_output_rows

if TYPE_CHECKING:
    from cosmos_posttrain.models.chunks import ModelChunks
    from cosmos_posttrain.models.gpt_model import CosmosGPTModel

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
# Noise on the mean, in standard deviations of the old rows. Equal output rows would pass back no
# gradient (p - y adds up to 0 over the tokens), only its rounding errors, and Adam, which divides
# them by their own size, would move the whole network by them in its first step.
MEAN_NOISE = 0.1


@dataclass(frozen=True)
class Transfer:
    """What becomes of a checkpoint's rows; made by ``plan_transfer``.

    Attributes:
        source: the checkpoint.
        config: the model with the new vocabulary.
        init: ``reset``, ``mean``, ``aligned``, ``omp`` or ``digits``.
        seed: of fresh rows.
        pairs: the co-occurrence, for ``aligned`` and ``omp``; None otherwise.
        levels: FSQ levels of the old and of the new tokenizer, for ``digits``; None otherwise.
    """

    source: CheckpointSource
    config: ModelConfig
    init: str
    seed: int
    pairs: Cooccurrence | None = None
    levels: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @functools.cached_property
    def _combinations(self) -> Tensor:
        """Of ``omp``; both tables share them."""
        assert self.pairs is not None
        return sparse_combinations(self.pairs)

    def rows(self, name: str, old: Tensor, init_std: float) -> Tensor:
        """The rows of all new tokens.

        Args:
            name: ``EMBEDDING`` or ``OUTPUT``.
            old: (old vocabulary, hidden) rows of the checkpoint's tokens.
            init_std: standard deviation of the model's fresh weights.

        Returns:
            (new vocabulary, hidden) float32.
        """
        if self.levels is not None:
            return digit_rows(old, *self.levels)
        if self.pairs is not None and self.init == "omp":
            pursued = pursued_input_rows if name == EMBEDDING else pursued_output_rows
            return pursued(old, self.pairs, self._combinations)
        if self.pairs is not None:
            aligned = aligned_input_rows if name == EMBEDDING else aligned_output_rows
            return aligned(old, self.pairs)
        generator = torch.Generator().manual_seed(2 * self.seed + (name == OUTPUT))
        noise = torch.randn(self.config.vocab_size, old.shape[1], generator=generator)
        if self.init == "mean":
            mean = old.float().mean(0)
            return mean + MEAN_NOISE * (old.float() - mean).square().mean().sqrt() * noise
        return init_std * noise

    def padded_rows(self, name: str, old: Tensor, init_std: float) -> Tensor:
        """The whole tensor of the model: new tokens, special tokens as they were, zeros.

        Args:
            name: ``EMBEDDING`` or ``OUTPUT``.
            old: the checkpoint's whole tensor, with all its rows.
            init_std: standard deviation of the model's fresh weights.
        """
        before, after = self.source.config, self.config
        rows = self.rows(name, old[: before.vocab_size], init_std)
        size = after.padded_vocab_size
        if name == EMBEDDING:
            # <bov>, <pad> and their kin mean the same for every tokenizer.
            special = old[before.vocab_size : before.input_vocab_size].float()
            rows, size = torch.cat([rows, special]), after.padded_input_vocab_size
        return torch.nn.functional.pad(rows, (0, 0, 0, size - rows.shape[0]))

    def load_weights(self, model: CosmosGPTModel | ModelChunks) -> None:
        """Fills a built model of the new vocabulary on this rank, at any layout.

        Raises:
            CheckpointError: the weights are damaged or do not fit.
        """
        from cosmos_posttrain.checkpoint.fill import fill

        weights = self.source.open_weights()

        def whole_tensor(name: str) -> Tensor:
            whole = weights.megatron(name)
            if name in (EMBEDDING, OUTPUT):
                whole = self.padded_rows(name, whole, model.config.init_method_std)
            return whole

        fill(model, whole_tensor)

    def describe(self) -> dict[str, Any]:
        """What a run's checkpoints record of it."""
        described: dict[str, Any] = {"init": self.init, "checkpoint": str(self.source.path)}
        described["old_vocab_size"] = self.source.config.vocab_size
        if self.source.contract is not None:
            described["old_tokenizer"] = to_plain(self.source.contract.tokenizer)
        if self.levels is not None:
            described["levels"] = {"old": self.levels[0], "new": self.levels[1]}
        if self.pairs is not None:
            described["cooccurrence"] = {"old": to_plain(self.pairs.old), **self.pairs.record}
        return described


def plan_transfer(
    source: CheckpointSource,
    init: str,
    vocab_size: int,
    new_tokenizer: TokenizerInfo | None,
    cooccurrence_path: str | None,
    seed: int,
) -> Transfer:
    """Checks that a checkpoint, the new data and the co-occurrence belong together.

    Args:
        source: the checkpoint, at the grid of the new data.
        init: ``reset``, ``mean``, ``aligned``, ``omp`` or ``digits``.
        vocab_size: of the new data.
        new_tokenizer: the new data's; None without a manifest.
        cooccurrence_path: the file, for ``aligned`` and ``omp``.
        seed: of fresh rows.

    Raises:
        ConfigError: fresh weights, a file for other tokenizers, or levels that nobody knows.
        DatasetError: the file is missing or damaged.
    """
    if source.is_fresh:
        raise ConfigError(
            f"--embedding_init {init} needs a checkpoint, but fresh weights have nothing to "
            "transfer; leave it out."
        )
    transfer = Transfer(
        source, dataclasses.replace(source.config, vocab_size=vocab_size), init, seed
    )
    if init in COOCCURRENCE_INITS:
        assert cooccurrence_path is not None
        pairs = _fitting_pairs(cooccurrence_path, source, vocab_size, new_tokenizer)
        return dataclasses.replace(transfer, pairs=pairs)
    if init == "digits":
        levels = _fitting_levels(source, vocab_size, new_tokenizer)
        return dataclasses.replace(transfer, levels=levels)
    return transfer


def _fitting_pairs(
    path: str, source: CheckpointSource, vocab_size: int, new_tokenizer: TokenizerInfo | None
) -> Cooccurrence:
    pairs = Cooccurrence.load(Path(path))
    old_tokenizer = None if source.contract is None else source.contract.tokenizer
    for whose, name, size, wanted, found in (
        ("model", "old", source.config.vocab_size, old_tokenizer, pairs.old),
        ("data set", "new", vocab_size, new_tokenizer, pairs.new),
    ):
        same = found.vocab_size == size
        if wanted is not None:
            same = same and found.sha256 == wanted.sha256
        if not same:
            own = f"{size} tokens"
            if wanted is not None:
                own = f"{wanted.id} (sha256 {wanted.sha256[:12]}, {size} tokens)"
            raise ConfigError(
                f"{path} was made with {name} tokenizer {found.id} (sha256 "
                f"{found.sha256[:12]}, {found.vocab_size} tokens), but the {whose}'s is {own}; "
                "write it again with python -m cosmos_posttrain.transfer."
            )
    return pairs


def _fitting_levels(
    source: CheckpointSource, vocab_size: int, new_tokenizer: TokenizerInfo | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """FSQ levels, old and new; a checkpoint that does not know its own has the new ones."""
    if new_tokenizer is None:
        raise ConfigError(
            "--embedding_init digits needs the tokenizer's FSQ levels, but the data set has no "
            "manifest; prepare it with prepare_dataset.py, or give reset or mean."
        )
    new = tuple(new_tokenizer.levels)
    old = new if source.contract is None else tuple(source.contract.tokenizer.levels)
    size = source.config.vocab_size
    if math.prod(old) != size or math.prod(new) != vocab_size:
        raise ConfigError(
            "--embedding_init digits needs the FSQ levels of the checkpoint's tokenizer, but the "
            f"checkpoint does not name it and has {size} tokens where {new_tokenizer.id} has "
            f"{vocab_size}; give aligned, reset or mean."
        )
    if len(old) != len(new):
        raise ConfigError(
            f"--embedding_init digits needs codes of as many digits, but the FSQ levels are "
            f"{','.join(map(str, old))} and {','.join(map(str, new))}; give aligned, reset or mean."
        )
    return old, new
