"""Preparation with prompts: one embedding each, the same bytes however it is run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR, run_distributed
from helpers.prepared import BlockMean, config, contents
from helpers.prompts import PROMPTS, prepare_prompts, write_lines
from helpers.t5 import write_t5

from cosmos_posttrain.data import prompts as stored_prompts
from cosmos_posttrain.data.batch import SequenceLayout, make_batch
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.layout import SOURCES_FILE
from cosmos_posttrain.data.manifest import Manifest
from cosmos_posttrain.errors import (
    ConfigError,
    DatasetError,
    OutputFolderError,
    PartialFailureError,
    TextError,
    UserError,
)
from cosmos_posttrain.prepare import prompt_job
from cosmos_posttrain.prepare.prepare import prepare
from cosmos_posttrain.text import TextEncoder, identify_text_encoder, load_text_encoder
from cosmos_posttrain.text import loading as text_loading
from cosmos_posttrain.tokenizer import loading as tokenizer_loading

LINES = [*PROMPTS, "a star turns"]

# Notes each prompt that is encoded, and kills itself when told to: after a number of prompt shards,
# before the clips, or after a number of clips.
SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from helpers.prepared import BlockMean, config
from cosmos_posttrain.data import prompts as stored
from cosmos_posttrain.prepare import prompt_job
from cosmos_posttrain.prepare.prepare import prepare
from cosmos_posttrain.text import TextEncoder

prompt_job.PROMPTS_PER_SHARD = stored.PROMPTS_PER_SHARD = 2
lines, output, noted, point = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
encode_prompts = TextEncoder.encode_tokens

def die_at(name):
    if name == point:
        os.kill(os.getpid(), signal.SIGKILL)

calls = {{"prompts": 0, "clips": 0}}

def noting(self, tokens, batch_size=8):
    die_at("prompts " + str(calls["prompts"]))
    calls["prompts"] += 1
    with noted.open("a") as file:
        file.writelines(item.prompt + "\\n" for item in tokens)
    return encode_prompts(self, tokens, batch_size)

TextEncoder.encode_tokens = noting

class Dying(BlockMean):
    def encode(self, video):
        die_at("clips " + str(calls["clips"]))
        calls["clips"] += 1
        return super().encode(video)

settings = dict(input_videos_dir=None, input_jsonl=str(lines), text_encoder_path="tiny")
prepare(config(lines.parent, output, **settings), Dying())
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("lines"))


@pytest.fixture(scope="module")
def reference(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "tokens"
    prepare_prompts(lines, output)
    return output


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts in the order in which they are encoded from now on."""
    found: list[str] = []
    encode = TextEncoder.encode_tokens

    def spy(self, tokens, batch_size=8):
        found.extend(item.prompt for item in tokens)
        return encode(self, tokens, batch_size)

    monkeypatch.setattr(TextEncoder, "encode_tokens", spy)
    return found


def test_every_clip_gets_the_text_of_its_own_line(reference: Path) -> None:
    data = TokenDataset(reference, "all")
    encoder = load_text_encoder("tiny", "cpu")
    assert len(data) == 10
    for number in range(len(data)):
        row = data.row(number)
        expected = LINES[int(row.source.removesuffix(".mp4"))]
        assert row.prompt == expected
        context = data.context(number)
        assert context is not None and context.dtype == torch.float32
        assert context.shape == (encoder.context_len, encoder.width)
        assert torch.equal(context, encoder.embed([expected])[0].bfloat16().float())
        length = len(encoder.tokenize([expected])[0].ids)
        assert context[:length].any() and not context[length:].any()


def test_a_prompt_is_encoded_once(lines: Path, tmp_path: Path, encoded: list[str]) -> None:
    manifest = prepare_prompts(lines, tmp_path / "tokens")
    assert sorted(encoded) == sorted(set(LINES))
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


def _prepare(lines: str, output: str) -> int:
    """Prepares as the script does; returns how often this process loaded a text encoder."""
    loads = 0
    load = text_loading.load_text_encoder

    def spy(*arguments, **settings):
        nonlocal loads
        loads += 1
        return load(*arguments, **settings)

    text_loading.load_text_encoder = spy
    settings = {"input_videos_dir": None, "input_jsonl": lines, "text_encoder_path": "tiny"}
    prepare(config(Path(lines).parent, Path(output), **settings), BlockMean())
    return loads


@pytest.mark.distributed
def test_ranks_change_no_byte_and_load_only_what_they_need(lines, reference, tmp_path) -> None:
    output = tmp_path / "tokens"
    assert run_distributed(_prepare, 2, str(lines), str(output)) == [1, 0]  # one prompt shard
    assert contents(output) == contents(reference)
    assert run_distributed(_prepare, 2, str(lines), str(output)) == [0, 0]


def test_never_two_encoders_in_memory(lines, tmp_path, monkeypatch) -> None:
    alive: list[tuple[str, bool]] = []  # what is loaded, and whether the other one is there
    models: weakref.WeakSet[object] = weakref.WeakSet()
    tokenizers: weakref.WeakSet[object] = weakref.WeakSet()
    load_text = text_loading.load_text_encoder

    def load_tokenizer_pair(*_: object) -> BlockMean:
        alive.append(("tokenizer", bool(models)))
        encoder = BlockMean()
        tokenizers.add(encoder)
        return encoder

    def load_text_encoder(*arguments: object) -> TextEncoder:
        alive.append(("text encoder", bool(tokenizers)))
        encoder = load_text(*arguments)
        models.add(encoder._model)
        return encoder

    monkeypatch.setattr(tokenizer_loading, "load_tokenizer_pair", load_tokenizer_pair)
    monkeypatch.setattr(text_loading, "load_text_encoder", load_text_encoder)
    settings = {"input_videos_dir": None, "input_jsonl": str(lines), "text_encoder_path": "tiny"}
    settings |= {"encoder_path": "block-mean"}
    prepare(config(lines.parent, tmp_path / "tokens", **settings))
    assert alive == [("tokenizer", False), ("text encoder", False), ("tokenizer", False)]
    alive.clear()
    prepare(config(lines.parent, tmp_path / "tokens", **settings))
    assert alive == [("tokenizer", False)]  # for its hash


def test_an_encoder_is_known_by_its_weights_whether_it_is_loaded_or_not(tmp_path) -> None:
    folder = write_t5(tmp_path / "t5")
    loaded, read = load_text_encoder(folder, "cpu"), identify_text_encoder(folder, "cpu")
    for name in ("id", "sha256", "width", "context_len", "dtype", "device"):
        assert getattr(loaded, name) == getattr(read, name), name
    # A path may come to hold other weights, a commit may not.
    assert identify_text_encoder(folder, "cpu", None, {read.id: "other"}) == read
    commit = tmp_path / f"t5@{'0' * 40}"
    folder.rename(commit)
    assert identify_text_encoder(commit, "cpu", None, {str(commit): "known"}).sha256 == "known"


def test_other_weights_under_the_same_name_are_another_data_set(lines, tmp_path) -> None:
    folder = write_t5(tmp_path / "t5")
    settings = {"input_videos_dir": None, "input_jsonl": str(lines)}
    settings |= {"text_encoder_path": str(folder)}
    prepare(config(lines.parent, tmp_path / "tokens", **settings), BlockMean())
    shutil.rmtree(folder)
    write_t5(folder, gated=True)
    with pytest.raises(OutputFolderError, match="text_encoder sha256"):
        prepare(config(lines.parent, tmp_path / "tokens", **settings), BlockMean())


@pytest.mark.parametrize(
    "points",
    [
        pytest.param(("prompts 1", "clips 0"), marks=pytest.mark.slow),
        pytest.param(("prompts 0",), marks=pytest.mark.slow),
        pytest.param(("clips 1", "clips 1"), marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_continues_to_the_same_bytes(lines, tmp_path, points) -> None:
    """Two prompt shards and three of clips; killed before, between and behind the prompts."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(REPOSITORY_DIR / "tests")))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY_DIR), "OMP_NUM_THREADS": "1"}

    def run(output: str, point: str) -> int:
        words = [str(lines), str(tmp_path / output), str(tmp_path / f"{output}.txt"), point]
        return subprocess.run([sys.executable, script, *words], env=environment).returncode

    for point in points:
        assert run("parts", point) == -signal.SIGKILL
        assert not (tmp_path / "parts" / "manifest.json").exists()
    assert run("parts", "") == 0 and run("whole", "") == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    for output in ("parts", "whole"):
        noted = (tmp_path / f"{output}.txt").read_text().splitlines()
        assert sorted(noted) == sorted(set(LINES))


def test_prompts_over_several_shards(lines, reference, tmp_path, monkeypatch) -> None:
    for module in (prompt_job, stored_prompts):
        monkeypatch.setattr(module, "PROMPTS_PER_SHARD", 3)
    prepare_prompts(lines, tmp_path / "tokens")
    assert len(Manifest.load(tmp_path / "tokens").prompts) == 2
    first, second = TokenDataset(reference, "all"), TokenDataset(tmp_path / "tokens", "all")
    for number in range(len(first)):
        assert first.row(number).prompt == second.row(number).prompt
        # Other prompts run together: rounding, and then that of bfloat16.
        torch.testing.assert_close(
            first.context(number), second.context(number), rtol=2**-7, atol=1e-5
        )


def test_several_folders_go_together_if_their_text_encoder_does(lines, reference, tmp_path) -> None:
    (tmp_path / "videos").mkdir()
    other = write_lines(tmp_path / "videos", ["another prompt", "nothing"])
    prepare_prompts(other, tmp_path / "more")
    both = TokenDataset([reference, tmp_path / "more"], "all")
    parts = [TokenDataset(folder, "all") for folder in (reference, tmp_path / "more")]
    assert len(both) == 10 + 4
    for number in range(len(both)):
        part, own = (parts[0], number) if number < 10 else (parts[1], number - 10)
        assert torch.equal(both.context(number), part.context(own))
        assert both.row(number).prompt == part.row(own).prompt
    prepare_prompts(other, tmp_path / "float32", embedding_dtype="float32")
    with pytest.raises(DatasetError, match="text_encoder dtype bfloat16 here, float32 there"):
        TokenDataset([reference, tmp_path / "float32"], "all")


def test_lines_that_cannot_be_prepared_are_failures_with_a_reason(tmp_path) -> None:
    (tmp_path / "videos").mkdir()
    lines = write_lines(tmp_path / "videos", ["a", None, "  ", "b", "half \ud800"])
    with lines.open("a") as file:
        file.write('{"visual_input": "missing.mp4", "prompt": "c"}\n')
        file.write('{"visual_input": "0.mp4"}\n')
    with pytest.raises(PartialFailureError, match="5 of 7 videos"):
        prepare_prompts(lines, tmp_path / "tokens")
    rows = (tmp_path / "tokens" / "failures.jsonl").read_text().splitlines()
    reasons = [(row["source"], row["reason"]) for row in map(json.loads, rows)]
    named = dict(reasons)
    assert named["1.mp4"] == f'its prompt on line 2 of {lines} is missing; write "prompt": "...".'
    assert named["2.mp4"].startswith(f"its prompt on line 3 of {lines} is empty")
    assert f"on line 5 of {lines}" in named["4.mp4"] and "half a character" in named["4.mp4"]
    assert "missing.mp4 does not exist" in named["missing.mp4"]
    assert f"on line 7 of {lines} is missing" in named["0.mp4"]
    assert len(reasons) == 5
    assert len(TokenDataset(tmp_path / "tokens", "all")) == 4  # two clips of each of the others


def test_without_any_prompt_the_second_run_says_the_same(tmp_path) -> None:
    (tmp_path / "videos").mkdir()
    lines = write_lines(tmp_path / "videos", [None, " "])
    for _ in range(2):
        with pytest.raises(PartialFailureError, match="2 of 2 videos"):
            prepare_prompts(lines, tmp_path / "tokens")


def test_a_long_prompt_is_cut_and_it_is_said(tmp_path, capsys) -> None:
    (tmp_path / "videos").mkdir()
    long = " ".join(f"word{number}" for number in range(10_000))
    lines = write_lines(tmp_path / "videos", [long, "b"])
    prepare_prompts(lines, tmp_path / "tokens")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "it is cut from character" in warnings[0]
    place = int(warnings[0].split("from character ")[1].split()[0])
    assert 20 < place < 200  # 31 tokens and the end
    context = TokenDataset(tmp_path / "tokens", "all").context(0)
    assert context is not None and context[-1].any()


def test_another_dtype_is_another_data_set(lines, reference) -> None:
    with pytest.raises(OutputFolderError, match="text_encoder dtype float32 here, bfloat16 there"):
        prepare_prompts(lines, reference, embedding_dtype="float32")


def test_bad_input_writes_nothing(lines, tmp_path, monkeypatch) -> None:
    broken = lines.with_name("broken.jsonl")
    broken.write_text('{"visual_input": "0.mp4", "prompt": "a"}\n' * 6 + "{\n")
    empty = write_t5(tmp_path / "t5")
    (empty / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"line 7 of .*broken\.jsonl is not JSON"):
        prepare_prompts(broken, tmp_path / "tokens")
    with pytest.raises(ConfigError, match="needs --input_jsonl"):
        prepare_prompts(lines, tmp_path / "tokens", input_videos_dir="x", input_jsonl=None)
    settings = {"input_videos_dir": None, "input_jsonl": str(lines)}
    with pytest.raises(TextError, match="t5 holds no encoder weights") as caught:
        no_weights = config(lines, tmp_path / "tokens", **settings, text_encoder_path=str(empty))
        prepare(no_weights, BlockMean())
    assert caught.value.exit_code == 2
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(TextError, match="transformers, which is not installed") as caught:
        no_package = config(lines, tmp_path / "tokens", **settings, text_encoder_path="tiny")
        prepare(no_package, BlockMean())
    assert caught.value.exit_code == 2
    assert not (tmp_path / "tokens").exists()


def test_damaged_embeddings_are_named(reference, tmp_path) -> None:
    shutil.copytree(reference, tmp_path / "tokens")
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
