"""Rows for new tokens, made from a checkpoint's rows for old ones; docs/embedding_transfer.md.

Flows in: a checkpoint, the number of new tokens and, for ``aligned``, the co-occurrence of new and
old tokens. Flows out: the checkpoint's weights in a built model of the new vocabulary, with other
input embeddings and output rows. Every rank makes the same rows and keeps its part.

    aligned    from the old tokens at the same place and time; see ``rows.py``
    mean       every row is the mean of the old ones, and a little noise
    reset      fresh rows, drawn as the model's own fresh weights are
"""

from __future__ import annotations

import dataclasses
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
from cosmos_posttrain.transfer.cooccurrence import Cooccurrence
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
        init: ``reset``, ``mean`` or ``aligned``.
        seed: of fresh rows.
        pairs: the co-occurrence; None unless ``aligned``.
    """

    source: CheckpointSource
    config: ModelConfig
    init: str
    seed: int
    pairs: Cooccurrence | None = None

    def rows(self, name: str, old: Tensor, init_std: float) -> Tensor:
        """The rows of all new tokens.

        Args:
            name: ``EMBEDDING`` or ``OUTPUT``.
            old: (old vocabulary, hidden) rows of the checkpoint's tokens.
            init_std: standard deviation of the model's fresh weights.

        Returns:
            (new vocabulary, hidden) float32.
        """
        if self.pairs is not None:
            return (aligned_input_rows if name == EMBEDDING else aligned_output_rows)(
                old, self.pairs
            )
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
        init: ``reset``, ``mean`` or ``aligned``.
        vocab_size: of the new data.
        new_tokenizer: the new data's; None without a manifest.
        cooccurrence_path: the file, for ``aligned``.
        seed: of fresh rows.

    Raises:
        ConfigError: fresh weights, or a file for other tokenizers.
        DatasetError: the file is missing or damaged.
    """
    if source.is_fresh:
        raise ConfigError(
            f"--embedding_init {init} needs a checkpoint, but fresh weights have nothing to "
            "transfer; leave it out."
        )
    config = dataclasses.replace(source.config, vocab_size=vocab_size)
    if init != "aligned":
        return Transfer(source, config, init, seed)
    assert cooccurrence_path is not None
    pairs = Cooccurrence.load(Path(cooccurrence_path))
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
                f"{cooccurrence_path} was made with {name} tokenizer {found.id} (sha256 "
                f"{found.sha256[:12]}, {found.vocab_size} tokens), but the {whose}'s is {own}; "
                "write it again with python -m cosmos_posttrain.transfer."
            )
    return Transfer(source, config, init, seed, pairs)
