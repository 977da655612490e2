"""Preparation with prompts: one embedding each, the same bytes however it is run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.prepared import contents
from helpers.prompts import PROMPTS, prepare_prompts, write_lines

from cosmos_posttrain.data.batch import SequenceLayout, make_batch
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.layout import SOURCES_FILE
from cosmos_posttrain.data.manifest import Manifest
from cosmos_posttrain.errors import (
    ConfigError,
    DatasetError,
    OutputFolderError,
    PartialFailureError,
    UserError,
)
from cosmos_posttrain.prepare import prompt_job
from cosmos_posttrain.prepare.prepare import Preparation
from cosmos_posttrain.text import TextEncoder, load_text_encoder


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("lines"))


@pytest.fixture(scope="module")
def reference(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "tokens"
    prepare_prompts(lines, output)
    return output


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts in the order in which they are encoded from now on."""
    encoded: list[str] = []
    encode = TextEncoder.encode_tokens

    def spy(self, tokens, batch_size=8):
        encoded.extend(item.prompt for item in tokens)
        return encode(self, tokens, batch_size)

    monkeypatch.setattr(TextEncoder, "encode_tokens", spy)
    return encoded


def test_every_clip_gets_the_text_of_its_own_line(reference: Path) -> None:
    data = TokenDataset(reference, "all")
    encoder = load_text_encoder("tiny", "cpu")
    assert len(data) == 10
    for number in range(len(data)):
        row = data.row(number)
        expected = [*PROMPTS, "a star turns"][int(row.source.removesuffix(".mp4"))]
        assert row.prompt == expected
        context = data.context(number)
        assert context is not None and context.dtype == torch.float32
        assert context.shape == (encoder.context_len, encoder.width)
        assert torch.equal(context, encoder.embed([expected])[0].bfloat16().float())
        length = len(encoder.tokenize([expected])[0].ids)
        assert context[:length].any() and not context[length:].any()


def test_a_prompt_is_encoded_once(lines: Path, tmp_path: Path, monkeypatch) -> None:
    encoded = counted(monkeypatch)
    manifest = prepare_prompts(lines, tmp_path / "tokens")
    assert sorted(encoded) == sorted(set(PROMPTS) | {"a star turns"})
    assert int(manifest.prompts.num_documents.sum()) == 4
    contract = manifest.contract
    assert (contract.kind, contract.context_len) == ("video2world", 32)
    encoded.clear()
    prepare_prompts(lines, tmp_path / "tokens")  # complete: nothing to do
    assert not encoded


def test_stored_as_float32(lines: Path, tmp_path: Path) -> None:
    prepare_prompts(lines, tmp_path / "tokens", embedding_dtype="float32")
    data = TokenDataset(tmp_path / "tokens", "all")
    expected = load_text_encoder("tiny", "cpu").embed([data.row(3).prompt or ""])[0]
    context = data.context(3)
    assert context is not None and float((context - expected).abs().max()) <= 1e-6


def test_without_sources_npz_the_rows_say_the_same(reference: Path, tmp_path: Path) -> None:
    shutil.copytree(reference, tmp_path / "copy")
    (tmp_path / "copy" / SOURCES_FILE).unlink()
    first, second = TokenDataset(reference, "all"), TokenDataset(tmp_path / "copy", "all")
    for number in range(len(first)):
        assert torch.equal(first.context(number), second.context(number))


def _prepare(lines: str, output: str) -> None:
    prepare_prompts(Path(lines), Path(output))


@pytest.mark.distributed
def test_the_number_of_ranks_does_not_change_a_byte(lines, reference, tmp_path) -> None:
    run_distributed(_prepare, 2, str(lines), str(tmp_path / "tokens"))
    assert contents(tmp_path / "tokens") == contents(reference)


def test_a_killed_run_continues_to_the_same_bytes(lines, reference, tmp_path, monkeypatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Preparation, "_job", killed)
        prepare_prompts(lines, tmp_path / "tokens")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("cosmos_posttrain.prepare.prepare.run_jobs", killed)
        prepare_prompts(lines, tmp_path / "tokens")
    assert (tmp_path / "tokens" / "prompts-00000.json").is_file()
    encoded = counted(monkeypatch)
    prepare_prompts(lines, tmp_path / "tokens")
    assert not encoded
    assert contents(tmp_path / "tokens") == contents(reference)


def test_prompts_over_several_shards(lines, reference, tmp_path, monkeypatch) -> None:
    for module in (prompt_job, __import__("cosmos_posttrain.data.prompts", fromlist=["x"])):
        monkeypatch.setattr(module, "PROMPTS_PER_SHARD", 3)
    prepare_prompts(lines, tmp_path / "tokens")
    assert len(Manifest.load(tmp_path / "tokens").prompts) == 2
    first, second = TokenDataset(reference, "all"), TokenDataset(tmp_path / "tokens", "all")
    for number in range(len(first)):
        assert first.row(number).prompt == second.row(number).prompt
        torch.testing.assert_close(first.context(number), second.context(number))


def test_lines_without_a_prompt_are_failures_with_a_reason(tmp_path, capsys) -> None:
    (tmp_path / "videos").mkdir()
    lines = write_lines(tmp_path / "videos", ["a", None, "  ", "b"])
    with pytest.raises(PartialFailureError, match="2 of 4 videos"):
        prepare_prompts(lines, tmp_path / "tokens")
    rows = (tmp_path / "tokens" / "failures.jsonl").read_text().splitlines()
    reasons = {row["source"]: row["reason"] for row in map(json.loads, rows)}
    assert "has no prompt" in reasons["1.mp4"] and "is empty" in reasons["2.mp4"]
    assert len(TokenDataset(tmp_path / "tokens", "all")) == 4  # two clips of each of the others


def test_a_long_prompt_is_cut_and_it_is_said(tmp_path, capsys) -> None:
    (tmp_path / "videos").mkdir()
    lines = write_lines(tmp_path / "videos", ["word " * 10_000, "b"])
    prepare_prompts(lines, tmp_path / "tokens")
    assert "it is cut from character" in capsys.readouterr().err
    context = TokenDataset(tmp_path / "tokens", "all").context(0)
    assert context is not None and context[-1].any()


def test_another_dtype_is_another_data_set(lines, reference) -> None:
    with pytest.raises(OutputFolderError, match="text_encoder dtype float32 here, bfloat16 there"):
        prepare_prompts(lines, reference, embedding_dtype="float32")


def test_bad_input(lines, tmp_path) -> None:
    broken = lines.with_name("broken.jsonl")
    broken.write_text('{"visual_input": "0.mp4", "prompt": "a"}\n' * 6 + "{\n")
    with pytest.raises(UserError, match=r"line 7 of .* is not JSON"):
        prepare_prompts(broken, tmp_path / "tokens")
    with pytest.raises(ConfigError, match="needs --input_jsonl"):
        prepare_prompts(lines, tmp_path / "tokens", input_videos_dir="x", input_jsonl=None)
    assert not (tmp_path / "tokens").exists()


def test_damaged_embeddings_are_named(lines, tmp_path) -> None:
    prepare_prompts(lines, tmp_path / "tokens")
    path = tmp_path / "tokens" / "prompts-00000.bin"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"prompts-00000\.bin is damaged"):
        TokenDataset(tmp_path / "tokens", "all").context(0)


def test_batches_carry_the_context(reference: Path) -> None:
    data = TokenDataset(reference, "all")
    layout = SequenceLayout(64, (64,), 66, num_given=6)
    batch = make_batch(layout, data, [0, 1, 2], torch.ones(3), [False, True, False])
    assert batch.context is not None
    assert batch.context[0].any() and not batch.context[1].any()
    assert np.flatnonzero(batch.loss_mask[0]).tolist() == list(range(6, 18))
    assert torch.equal(batch.labels[:, 6:18], torch.stack([data[n][6:] for n in range(3)]))
