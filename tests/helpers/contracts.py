"""Contracts of data that nobody prepared: what a checkpoint may record of its training data."""

from __future__ import annotations

from cosmos_posttrain.checkpoint.context import SplitInfo, TrainingData
from cosmos_posttrain.data.contract import Contract, TokenizerInfo, make_contract
from cosmos_posttrain.geometry import ClipGeometry, Compression


def make_tokenizer(
    name: str, vocab_size: int, levels: tuple[int, ...] | None = None
) -> TokenizerInfo:
    """A tokenizer whose hash is the first letter of its name."""
    return TokenizerInfo(name, name[0] * 64, (4, 8, 8), levels or (vocab_size,), vocab_size)


def contract_of(tokenizer: TokenizerInfo) -> Contract:
    """Clips of 9 frames of 24x16, which are 3x2x3 tokens."""
    return make_contract(tokenizer, ClipGeometry(9, 16, 24, Compression(4, 8, 8)), "uint16")


def data_of(tokenizer: TokenizerInfo) -> TrainingData:
    """What a run on such data records."""
    return TrainingData(contract_of(tokenizer), "f" * 64, SplitInfo("98,1,1", 1234))
