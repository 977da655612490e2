"""The original recipe's .pt files: every id and row arrives, and nothing of them is run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.prepared import BlockMean, config, contents

from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.manifest import Manifest
from cosmos_posttrain.errors import ConfigError, OutputFolderError, PartialFailureError, UserError
from cosmos_posttrain.prepare import pt_files
from cosmos_posttrain.prepare.prepare import prepare
from cosmos_posttrain.text import load_text_encoder

COUNTS = {"train": 4, "val": 1, "test": 2}
PROMPTS = ["a red ball", "a blue box", "a red ball", "a star", "a blue box", "a cone", "a star"]
RAN = False


class FullVocabulary(BlockMean):
    """The grid of ``BlockMean`` with the published tokenizers' vocabulary."""

    levels = (8, 8, 8, 5, 5, 5)
    vocab_size = 64_000


class RunsCode:
    """What a pickle can do, and none of ours must let it do."""

    def __reduce__(self):
        return run_code, ()


def run_code() -> None:
    global RAN
    RAN = True


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """Seven clips of 3x2x3 tokens as the original wrote them; some prompts come twice."""
    folder = tmp_path / "original"
    folder.mkdir()
    encoder = load_text_encoder("tiny", "cpu")
    contexts = iter(encoder.embed(PROMPTS))
    clips = iter(torch.arange(7 * 18).view(7, 18) * 507)  # 0 to 63,375
    for split, count in COUNTS.items():
        for number in range(count):
            ids = [64_000, *next(clips).tolist(), *[64_002] * 64]
            torch.save(torch.tensor(ids, dtype=torch.int32), folder / f"{split}_video_{number}.pt")
            torch.save(next(contexts).clone(), folder / f"{split}_prompt_{number}.pt")
    counts = {f"{split}_samples": count for split, count in COUNTS.items()}
    (folder / "metadata.json").write_text(json.dumps(counts))
    return folder


def take_over(original: Path, output: Path, **changes: object) -> Manifest:
    settings = {"input_videos_dir": None, "input_pt_dir": str(original)}
    settings |= {"text_encoder_path": "tiny", "embedding_dtype": "float32"}
    return prepare(config(original, output, **(settings | changes)), FullVocabulary())


def test_every_clip_arrives_with_its_own_prompt(original: Path, tmp_path: Path) -> None:
    manifest = take_over(original, tmp_path / "tokens")
    assert manifest.num_documents == 7 and int(manifest.prompts.num_documents.sum()) == 4
    encoder = load_text_encoder("tiny", "cpu")
    text = manifest.contract.text_encoder
    assert text is not None and (text.sha256, text.width) == (encoder.sha256, encoder.width)
    data = TokenDataset(tmp_path / "tokens", "all")
    order = [f"{split}_video_{n}.pt" for split, count in COUNTS.items() for n in range(count)]
    for number, prompt in enumerate(PROMPTS):
        assert data.row(number).source == order[number]
        assert torch.equal(data[number], torch.arange(18 * number, 18 * number + 18) * 507)
        context = data.context(number)
        assert context is not None
        # Rounding alone: a prompt is encoded with others in another order.
        torch.testing.assert_close(context, encoder.embed([prompt])[0], rtol=0, atol=1e-5)


def test_killed_between_shards_it_goes_on(original: Path, tmp_path: Path, monkeypatch) -> None:
    take_over(original, tmp_path / "whole")
    write = pt_files._write_clips

    def killed(folder: Path, number: int, *rest: object) -> None:
        if number == 2:
            raise KeyboardInterrupt
        write(folder, number, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pt_files, "_write_clips", killed)
        take_over(original, tmp_path / "tokens")
    written: list[int] = []

    def counted(folder: Path, number: int, *rest: object) -> None:
        written.append(number)
        write(folder, number, *rest)

    monkeypatch.setattr(pt_files, "_write_clips", counted)
    take_over(original, tmp_path / "tokens")
    assert written == [2, 3]
    take_over(original, tmp_path / "tokens")
    assert written == [2, 3]
    assert contents(tmp_path / "tokens") == contents(tmp_path / "whole")
    with pytest.raises(OutputFolderError, match="holds another data set"):
        take_over(original, tmp_path / "tokens", embedding_dtype="bfloat16")


def test_files_that_do_not_fit_are_failures_and_run_nothing(original: Path, tmp_path: Path) -> None:
    good = torch.load(original / "train_video_0.pt", weights_only=True)
    torch.save(RunsCode(), original / "train_video_0.pt")
    torch.save({"prompt": RunsCode()}, original / "train_prompt_1.pt")
    torch.save(good.bfloat16(), original / "train_video_2.pt")
    torch.save(good[:40], original / "train_video_3.pt")
    torch.save(torch.zeros(32, 64), original / "val_prompt_0.pt")
    torch.save(torch.ones(32, 63), original / "test_prompt_0.pt")
    (original / "test_video_1.pt").write_bytes(b"not a file of torch")
    with pytest.raises(PartialFailureError, match="6 of 7"):
        take_over(original, tmp_path / "tokens")
    rows = (tmp_path / "tokens" / "failures.jsonl").read_text().splitlines()
    reasons = {row["source"]: row["reason"] for row in map(json.loads, rows)}
    for name, words in {
        "train_video_0.pt": "nothing of it was run",
        "train_video_1.pt": "train_prompt_1.pt holds more than a tensor",
        "train_video_2.pt": "bfloat16, which is no dtype of tokens",
        "val_video_0.pt": "zeros alone",
        "test_video_0.pt": "[32, 63]",
        "test_video_1.pt": "test_video_1.pt",
    }.items():
        assert words in reasons[name] and "\n" not in reasons[name], name
    assert not RAN


def test_another_clip_size_or_tokenizer_is_named(original: Path, tmp_path: Path) -> None:
    with pytest.raises(PartialFailureError, match="7 of 7"):
        take_over(original, tmp_path / "wide", width=48)
    reasons = (tmp_path / "wide" / "failures.jsonl").read_text()
    assert "holds 18 tokens before the padding, not 36" in reasons
    for name in ("train_video_0.pt", "train_video_1.pt"):
        ids = torch.load(original / name, weights_only=True)
        ids[0 if name == "train_video_0.pt" else 5] = 70_000
        torch.save(ids, original / name)
    with pytest.raises(PartialFailureError, match="2 of 7"):
        take_over(original, tmp_path / "tokens")
    reasons = (tmp_path / "tokens" / "failures.jsonl").read_text()
    assert "does not begin with <bov> (64000)" in reasons
    assert "to 70000; the vocabulary is [0, 64000)" in reasons


def test_bad_folders_write_nothing(original: Path, tmp_path: Path) -> None:
    output = tmp_path / "tokens"
    with pytest.raises(ConfigError, match="needs --text_encoder_path"):
        take_over(original, output, text_encoder_path=None)
    with pytest.raises(UserError, match="does not exist"):
        take_over(tmp_path / "nowhere", output)
    (original / "val_prompt_0.pt").rename(tmp_path / "moved.pt")
    with pytest.raises(UserError, match=r"val_prompt_0\.pt is missing"):
        take_over(original, output)
    (original / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"has no metadata\.json"):
        take_over(original, output)
    assert not output.exists()
