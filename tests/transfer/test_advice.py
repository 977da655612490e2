"""What a run says about the rows of its tokens: one sentence, or nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers.contracts import data_of, make_tokenizer
from helpers.token_pairs import NEW_SIZE, OLD_SIZE, dense_overlaps, make_pairs

from cosmos_posttrain.checkpoint.formats.registry import WRITABLE
from cosmos_posttrain.checkpoint.source import CheckpointSource
from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.transfer import advice
from cosmos_posttrain.transfer.embedding import Transfer, plan_transfer

OLD = make_tokenizer("old", OLD_SIZE, (6, 5))
NEW = make_tokenizer("new", OLD_SIZE, (6, 5))
OTHER_LEVELS = make_tokenizer("fsq", OLD_SIZE, (5, 6))
SMALLER = make_tokenizer("new", NEW_SIZE, (5, 4))
BETTER = "python -m cosmos_posttrain.transfer may give a better start (docs/embedding_transfer.md)"


def source_of(info: TokenizerInfo | None) -> CheckpointSource:
    data = None if info is None else data_of(info)
    config = preset("tiny", vocab_size=OLD_SIZE)
    return CheckpointSource(Path("somewhere"), WRITABLE["pt"], config, data)


def said(
    old: TokenizerInfo | None, new: TokenizerInfo | None, init: str = "keep", size: int = OLD_SIZE
) -> str:
    source = source_of(old)
    transfer = None if init == "keep" else plan_transfer(source, init, size, new, None, seed=0)
    sentence = advice.sentence(source, new, transfer)
    assert sentence is not None
    assert sentence.startswith(f"embedding_init {init}: ") and "\n" not in sentence
    assert ". " not in sentence and not sentence.endswith(".")
    return sentence


@pytest.mark.parametrize("tokenizer", [OLD, dataclasses.replace(OLD, id="another/name")])
def test_nothing_is_said_where_nothing_changes(tokenizer: TokenizerInfo) -> None:
    assert advice.sentence(source_of(OLD), tokenizer, None) is None
    fresh = CheckpointSource(None, None, preset("tiny"))
    assert advice.sentence(fresh, tokenizer, None) is None


def test_rows_that_are_kept_at_a_swap() -> None:
    alike = said(OLD, NEW)
    assert "the tokens of new get the rows of old's as they are" in alike
    assert "both have the FSQ levels 6,5" in alike and alike.endswith(BETTER)
    different = said(OLD, OTHER_LEVELS)
    assert "may not help, for their FSQ levels differ (6,5 and 5,6)" in different
    assert different.endswith(BETTER)


def test_rows_that_are_kept_where_nobody_knows_the_tokenizer() -> None:
    public = said(None, NEW)
    assert "the checkpoint does not say which tokenizer" in public
    assert "if that is not new, rows aligned" in public and public.endswith(BETTER)
    for old in (OLD, None):
        for init in ("keep", "reset"):
            # The command needs to know which frames the tokens show.
            unknown = said(old, None, init)
            assert "the data set has no manifest" in unknown and BETTER not in unknown


@pytest.mark.parametrize("init", ["mean", "reset"])
def test_rows_that_are_replaced(init: str) -> None:
    assert said(OLD, NEW, init).endswith(BETTER)
    assert "keep would lose nothing" in said(OLD, OLD, init)
    smaller = said(OLD, SMALLER, init, NEW_SIZE)
    assert f"all {NEW_SIZE} tokens get" in smaller
    assert f"the checkpoint's {OLD_SIZE} rows cannot be kept for {NEW_SIZE} tokens" in smaller


@pytest.mark.parametrize(
    ("init", "how"),
    [
        ("aligned", "rows from the tokens of old at the same place"),
        ("omp", "rows combined from a few tokens of old whose places together resemble"),
    ],
)
def test_rows_that_are_aligned(init: str, how: str) -> None:
    pairs = make_pairs(*dense_overlaps())
    seen = pairs.record["num_new_tokens"]
    for source in (source_of(OLD), source_of(None)):
        config = dataclasses.replace(source.config, vocab_size=NEW_SIZE)
        sentence = advice.sentence(source, SMALLER, Transfer(source, config, init, 0, pairs))
        assert sentence is not None and sentence.startswith(f"embedding_init {init}: ")
        assert how in sentence
        assert f"{seen} of {NEW_SIZE} new tokens were seen in 3 clips" in sentence
        assert ("does not say that old was" in sentence) == (source.contract is None)
        assert BETTER not in sentence


def test_rows_of_digits() -> None:
    alike = said(OLD, NEW, "digits")
    assert "(FSQ levels 6,5), which helps where" in alike and alike.endswith(BETTER)
    smaller = said(OLD, SMALLER, "digits", NEW_SIZE)
    assert "(FSQ levels 6,5 and 5,4)" in smaller and "does not say" not in smaller
    assert "does not say that these were its tokenizer's; rows" in said(None, NEW, "digits")
