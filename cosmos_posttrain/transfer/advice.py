"""Which start the rows of the new tokens got, and what else this run's data allow: one sentence.

Flows in: the checkpoint, the new data's tokenizer and the transfer that was planned. Flows out:
what the user is told at the start of a run; docs/embedding_transfer.md has the measurements behind.
"""

from __future__ import annotations

from cosmos_posttrain.checkpoint.source import CheckpointSource
from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.transfer.embedding import Transfer

_ALIGNED = (
    "rows aligned with python -m cosmos_posttrain.transfer may give a better start "
    "(docs/embedding_transfer.md)"
)
_NO_MANIFEST = (
    "the data set has no manifest, so they cannot be aligned with its tokenizer: "
    "prepare_dataset.py writes one (docs/embedding_transfer.md)"
)


def sentence(
    source: CheckpointSource, tokenizer: TokenizerInfo | None, transfer: Transfer | None
) -> str | None:
    """What the start of a run does with the rows of its tokens, and why that may help.

    Args:
        source: the checkpoint that the run starts from.
        tokenizer: the new data's; None for data without a manifest.
        transfer: what was planned; None keeps the checkpoint's rows.

    Returns:
        None where there is nothing to say: fresh weights, or rows that stay with their tokenizer.
    """
    if source.is_fresh:
        return None
    old = None if source.contract is None else source.contract.tokenizer
    if transfer is None:
        return _kept(old, tokenizer)
    if transfer.pairs is not None:
        return _aligned(old, transfer)
    if transfer.levels is not None:
        return _by_digits(old, transfer)
    return _replaced(old, tokenizer, source.config.vocab_size, transfer)


def _kept(old: TokenizerInfo | None, new: TokenizerInfo | None) -> str | None:
    if new is None:
        return f"embedding_init keep: all tokens keep the checkpoint's rows; {_NO_MANIFEST}"
    if old is None:
        return (
            "embedding_init keep: all tokens keep the checkpoint's rows; the checkpoint does not "
            f"say which tokenizer is its own, and if that is not {new.id}, {_ALIGNED}"
        )
    if old.sha256 == new.sha256:
        return None
    why = (
        f"which may help, for both have the FSQ levels {_levels(new)} and number their codes alike"
    )
    if old.levels != new.levels:
        why = (
            f"which may not help, for their FSQ levels differ ({_levels(old)} and {_levels(new)}) "
            "and so do the meanings of their numbers"
        )
    return (
        f"embedding_init keep: the tokens of {new.id} get the rows of {old.id}'s as they are, "
        f"{why}; {_ALIGNED}"
    )


def _aligned(old: TokenizerInfo | None, transfer: Transfer) -> str:
    assert transfer.pairs is not None
    record = transfer.pairs.record
    unchecked = ""
    if old is None:
        unchecked = f"; the checkpoint does not say that {transfer.pairs.old.id} was its tokenizer"
    name = transfer.pairs.old.id
    how = {
        "aligned": f"from the tokens of {name} at the same place and time",
        "omp": f"combined from a few tokens of {name} whose places together resemble its own",
    }
    return (
        f"embedding_init {transfer.init}: every token gets rows {how[transfer.init]}, so that the "
        f"model starts from what it knows of the picture; {record.get('num_new_tokens')} of "
        f"{transfer.config.vocab_size} new tokens were seen in {record.get('num_clips')} clips, "
        f"the others get the average{unchecked}"
    )


def _by_digits(old: TokenizerInfo | None, transfer: Transfer) -> str:
    assert transfer.levels is not None
    levels = " and ".join(",".join(map(str, each)) for each in dict.fromkeys(transfer.levels))
    unchecked = ""
    if old is None:
        unchecked = "; the checkpoint does not say that these were its tokenizer's"
    return (
        "embedding_init digits: every token gets the rows that its code's digits would have had "
        f"(FSQ levels {levels}), which helps where the digits of both tokenizers mean the same"
        f"{unchecked}; {_ALIGNED}"
    )


def _replaced(
    old: TokenizerInfo | None, new: TokenizerInfo | None, old_size: int, transfer: Transfer
) -> str:
    """Of ``mean`` and ``reset``."""
    size = transfer.config.vocab_size
    how = {"reset": "fresh rows", "mean": "the checkpoint's mean row and a little noise"}
    if new is None:
        advice = _NO_MANIFEST
    elif old is not None and old.sha256 == new.sha256:
        advice = "the tokenizer is the checkpoint's own, so keep would lose nothing"
    elif size != old_size:
        advice = f"the checkpoint's {old_size} rows cannot be kept for {size} tokens; {_ALIGNED}"
    else:
        advice = _ALIGNED
    return (
        f"embedding_init {transfer.init}: all {size} tokens get {how[transfer.init]}, which drops "
        f"what the checkpoint knows of single tokens; {advice}"
    )


def _levels(info: TokenizerInfo) -> str:
    return ",".join(map(str, info.levels))
