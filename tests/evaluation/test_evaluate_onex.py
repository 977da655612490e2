"""Figures on 1X's windows, against the same things computed the long way round."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.contracts import data_of, make_tokenizer
from helpers.distributed_run import run_distributed, run_script
from helpers.onex import SMALL, use_small_version, write_v1, write_v2
from helpers.reference import SHIPPED_DIR

from cosmos_posttrain import generate, load_model
from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.errors import (
    ConfigError,
    DatasetError,
    OutputFolderError,
    TokenizerError,
    UserError,
)
from cosmos_posttrain.evaluation.config.onex import (
    NEXT_8_FRAMES,
    PARTS,
    ROLLOUT,
    TEACHER_FORCED,
    OnexEvalConfig,
)
from cosmos_posttrain.evaluation.onex.command import run
from cosmos_posttrain.evaluation.onex.parts import PartModel
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.presets import preset
from cosmos_posttrain.prepare.config import PrepareConfig
from cosmos_posttrain.prepare.onex.windows import NOT_SERVED, open_windows
from cosmos_posttrain.prepare.prepare import prepare

# Windows 4 and 7 cross a segment, 5 and 10 are tails; only 0 to 2 and 8 to 9 have company.
SEGMENTS = ((51, 20, 17), (20, 48, 5))
SINGLE = [0, 1, 2, 3, 6, 8, 9]
PAIRS = [0, 1, 8]
WINDOW, FRAME, VOCAB = 36, 12, 600


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    use_small_version(monkeypatch)
    return write_v2(tmp_path / "in", "val", SEGMENTS, version=SMALL)


def make_config(folder: Path, output: Path, **changes: Any) -> OnexEvalConfig:
    settings = {"ar_model_dir": "random:tiny", "max_rollouts": None, "batch_size": 2} | changes
    return OnexEvalConfig(input_tokens_dir=str(folder), output_dir=str(output), **settings)


def all_tokens(folder: Path) -> torch.Tensor:
    parts = [np.fromfile(folder / f"video_{n}.bin", np.int32) for n in range(2)]
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)).view(-1, WINDOW)


def small_model(time: int) -> Any:
    return load_model("random:tiny", latent_shape=LatentShape(time, 4, 3), vocab_size=VOCAB)


def top_500(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy where all but the 500 most likely share what these leave, (n,)."""
    probabilities = logits.double().softmax(-1)
    order = probabilities.argsort(-1, descending=True)
    even = probabilities.clone()
    rest = probabilities.gather(-1, order[:, 500:]).sum(-1, keepdim=True) / (VOCAB - 500)
    even.scatter_(-1, order[:, 500:], rest.expand(-1, VOCAB - 500))
    return -even.gather(-1, labels[:, None])[:, 0].log()


def test_windows_and_pairs_of_one_segment(small: Path, tmp_path: Path) -> None:
    prepare(PrepareConfig(input_tokens_dir=str(small), output_prefix=str(tmp_path / "imported")))
    tokens = all_tokens(small)
    for folder in (small, tmp_path / "imported"):
        windows = open_windows(folder)
        assert windows.starts(1).tolist() == SINGLE and windows.starts(2).tolist() == PAIRS
        assert len(windows.segments) == 11 and (windows.segments == NOT_SERVED).sum() == 4
        for window in SINGLE:
            assert (windows.tokens(window) == tokens[window].numpy()).all()
        sources = [windows.source(window) for window in SINGLE]
        segments = [(0, 7), (0, 7), (0, 7), (0, 8), (1, 7), (1, 8), (1, 8)]
        assert sources == [f"shard {shard} segment {segment}" for shard, segment in segments]


def test_figures_are_those_of_the_models_own_logits(small: Path, tmp_path: Path) -> None:
    tokens = all_tokens(small)
    metrics = run(make_config(small, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert metrics["command"] == "onex" and metrics["failures"] == []
    figures = metrics["figures"]
    assert list(figures) == list(PARTS)
    assert [figures[part]["num_windows"] for part in PARTS] == [7, 3, 3]

    one, two = small_model(3), small_model(6)
    given, labels = WINDOW - FRAME, tokens[SINGLE][:, WINDOW - FRAME :]
    logits = one.logits(tokens[SINGLE])[:, given - 1 : -1]
    check(figures[NEXT_8_FRAMES], logits, labels)

    pairs = torch.cat([tokens[PAIRS], tokens[[n + 1 for n in PAIRS]]], dim=1)
    check(figures[TEACHER_FORCED], two.logits(pairs)[:, WINDOW - 1 : -1], pairs[:, WINDOW:])

    drawn = generate(two, pairs[:, :WINDOW], WINDOW, temperature=0)
    own = torch.cat([pairs[:, :WINDOW], drawn], dim=1)
    check(figures[ROLLOUT], two.logits(own)[:, WINDOW - 1 : -1], pairs[:, WINDOW:])
    assert figures[ROLLOUT]["nats_per_token"] != figures[TEACHER_FORCED]["nats_per_token"]


def check(found: dict[str, Any], logits: torch.Tensor, labels: torch.Tensor) -> None:
    """Compares with logits (B, n, V) and labels (B, n) by torch's own functions."""
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="none"
    ).view(labels.shape)
    assert found["nats_per_token"] == pytest.approx(nll.mean().item(), abs=1e-5)
    assert found["top_1"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    expected = top_500(logits.flatten(0, 1), labels.flatten()).mean().item()
    assert found["top_500_cross_entropy"] == pytest.approx(expected, abs=1e-5)
    num_frames = labels.shape[1] // FRAME
    frames = nll.view(len(nll), num_frames, FRAME).mean(dim=(0, 2)).tolist()
    per_frame = found["per_latent_frame"]
    assert per_frame[-num_frames:] == pytest.approx(frames, abs=1e-5)
    assert set(per_frame[:-num_frames]) == {None}
    assert len(found["per_position"]) == 4 and len(found["per_position"][0]) == 3


def test_imported_and_shipped_folders_give_the_same(small: Path, tmp_path: Path) -> None:
    prepare(PrepareConfig(input_tokens_dir=str(small), output_prefix=str(tmp_path / "imported")))
    parts = {"parts": f"{NEXT_8_FRAMES},{TEACHER_FORCED}"}
    first = run(make_config(small, tmp_path / "a", **parts))
    second = run(make_config(tmp_path / "imported", tmp_path / "b", **parts))
    assert first["figures"] == second["figures"] and first["rows"] == second["rows"]


def test_the_submission_says_what_the_rollout_scored(small: Path, tmp_path: Path) -> None:
    metrics = run(make_config(small, tmp_path / "out", write_submission=True, parts=ROLLOUT))
    folder = tmp_path / "out" / "submission"
    tokens, log_probs = (np.load(folder / f"{name}.npy") for name in ("tokens", "log_probs"))
    index = json.loads((folder / "submission.json").read_text())
    assert index["given_windows"] == PAIRS
    assert tokens.shape == log_probs.shape == (3, 3, 4, 3, 500) == tuple(index["shape"])
    assert tokens.dtype == np.uint16 and log_probs.dtype == np.float16
    truth = all_tokens(small)[[n + 1 for n in PAIRS]].view(3, 3, 4, 3, 1).numpy()
    hits = tokens == truth
    rest = np.log(np.maximum(1 - np.exp(log_probs.astype(float)).sum(-1), 1e-9) / (VOCAB - 500))
    scored = np.where(hits.any(-1), (log_probs * hits).sum(-1), rest)
    # float16 keeps three digits of a log-probability.
    expected = metrics["figures"][ROLLOUT]["top_500_cross_entropy"]
    assert -scored.mean() == pytest.approx(expected, abs=0.01)
    assert (tokens[..., 0] == truth[..., 0]).mean() == metrics["figures"][ROLLOUT]["top_1"]
    # The most likely tokens are those that the model goes on with.
    model = small_model(6)
    given = all_tokens(small)[PAIRS]
    drawn = generate(model, given, WINDOW, temperature=0)
    assert (tokens[..., 0].reshape(3, -1) == drawn.numpy()).all()


def test_a_test_set_gives_a_submission_and_no_figures(small: Path, tmp_path: Path) -> None:
    for name in ("segment_idx_0.bin", "segment_idx_1.bin", "metadata_0.json", "states_0.bin"):
        (small / name).unlink()
    with pytest.raises(DatasetError):
        run(make_config(small, tmp_path / "no"))
    metrics = run(make_config(small, tmp_path / "out", test_set=True, max_windows=4))
    assert metrics["figures"] == {} and [row["window"] for row in metrics["rows"]] == [0, 3, 7, 10]
    tokens = np.load(tmp_path / "out" / "submission" / "tokens.npy")
    drawn = generate(small_model(6), all_tokens(small)[[0, 3, 7, 10]], WINDOW, temperature=0)
    assert (tokens[..., 0].reshape(4, -1) == drawn.numpy()).all()


def test_a_killed_evaluation_goes_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    settings = {"batch_size": 1, "write_submission": True}
    whole = run(make_config(small, tmp_path / "whole", **settings))
    measure, calls = PartModel.measure, []

    def killed(*args: Any) -> Any:
        calls.append(args[1].name)
        if len(calls) in (4, 13):
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(PartModel, "measure", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(make_config(small, tmp_path / "out", **settings))
    again = run(make_config(small, tmp_path / "out", **settings))
    assert calls.count(NEXT_8_FRAMES) == 8 and calls.count(ROLLOUT) == 4  # one each anew
    for key in ("figures", "rows", "settings"):
        assert again[key] == whole[key]
    for name in ("tokens.npy", "log_probs.npy", "submission.json"):
        ours, theirs = (tmp_path / f / "submission" / name for f in ("out", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    capsys.readouterr()
    run(make_config(small, tmp_path / "out", **settings))
    assert "is complete already" in capsys.readouterr().out and len(calls) == 15
    with pytest.raises(OutputFolderError, match="holds another evaluation"):
        run(make_config(small, tmp_path / "out", max_windows=1))


def _evaluate(folder: Path, output: Path, tensor_size: int) -> dict[str, Any]:
    use_small_version()
    config = make_config(folder, output, write_submission=True)
    config.tensor_model_parallel_size = tensor_size
    return run(config)


@pytest.mark.distributed
@pytest.mark.parametrize("tensor_size", [1, 2])
def test_figures_of_two_processes_are_those_of_one(
    small: Path, tmp_path: Path, tensor_size: int
) -> None:
    one = run(make_config(small, tmp_path / "one", write_submission=True))
    results = run_distributed(_evaluate, 2, small, tmp_path / "two", tensor_size)
    assert results[0]["figures"] == results[1]["figures"]
    assert [row["window"] for row in results[0]["rows"]] == [*SINGLE, *PAIRS, *PAIRS]
    for part in PARTS:
        for key in ("nats_per_token", "top_500_cross_entropy", "top_1"):
            assert results[0]["figures"][part][key] == pytest.approx(
                one["figures"][part][key], abs=1e-5
            )
    ours, theirs = (
        np.load(tmp_path / name / "submission" / "tokens.npy") for name in ("one", "two")
    )
    assert (ours[..., 0] == theirs[..., 0]).all()


def write_checkpoint(folder: Path, name: str, levels: tuple[int, ...], vocab_size: int) -> Path:
    """A checkpoint without weights, trained on 4x8x8 tokens."""
    (folder / "weights").mkdir(parents=True)
    data = data_of(make_tokenizer(name, vocab_size, levels))
    context.write_context(folder, preset("tiny", vocab_size, LatentShape(3, 2, 3)), data=data)
    return folder


def test_another_tokenizer_is_refused(small: Path, tmp_path: Path) -> None:
    model = str(write_checkpoint(tmp_path / "model", "other", (10, 10, 6), 600))
    with pytest.raises(TokenizerError) as caught:
        run(make_config(small, tmp_path / "out", ar_model_dir=model))
    assert "was trained on tokens of other (4x8x8)" in str(caught.value)
    assert "tokens of small (8x8x8)" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError) as later:  # only its weights are missing
        run(make_config(small, tmp_path / "out", ar_model_dir=model, allow_tokenizer_mismatch=True))
    assert "trained on tokens" not in str(later.value)
    model = str(write_checkpoint(tmp_path / "few", "other", (8, 8), 64))
    with pytest.raises(TokenizerError, match="predicts 64 tokens, but"):
        run(make_config(small, tmp_path / "out", ar_model_dir=model, allow_tokenizer_mismatch=True))
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_sentence(small: Path, tmp_path: Path) -> None:
    lonely = write_v2(tmp_path / "lonely", "val", ((17,), (20,)), version=SMALL)
    with pytest.raises(DatasetError, match="has no 2 windows in a row of one segment"):
        run(make_config(lonely, tmp_path / "out"))
    with pytest.raises(DatasetError, match=r"is 1X's v1\.1"):
        run(make_config(write_v1(tmp_path / "v1"), tmp_path / "out"))
    with pytest.raises(ConfigError, match="'next' is none of next_8_frames"):
        run(make_config(small, tmp_path / "out", parts="next"))
    with pytest.raises(ConfigError, match="asks for videos"):
        run(make_config(small, tmp_path / "out", only_eval=False))
    with pytest.raises(UserError, match="Video2World model, which needs a text"):
        run(make_config(small, tmp_path / "out", ar_model_dir="random:tiny-video2world"))
    assert not (tmp_path / "out").exists()


def make_model_of_1x(folder: Path) -> Path:
    """A shipped small model with the vocabulary of 64,000, as a folder with model.pt."""
    source = SHIPPED_DIR / "ar" / "base_4b_like"
    folder.mkdir(parents=True)
    settings = json.loads((source / "config.json").read_text())
    settings |= {"vocab_size": 64000, "vocab_size_in": 64000}
    (folder / "config.json").write_text(json.dumps(settings))
    state = torch.load(source / "model.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name in ("model.tok_embeddings.weight", "model.output.weight"):
        rows = torch.randn(64000, settings["dim"], generator=generator) * 0.02
        state[name] = rows.to(state[name].dtype)
    torch.save(state, folder / "model.pt")
    return folder


@pytest.mark.slow
def test_a_published_command_runs_as_it_is(tmp_path: Path) -> None:
    make_model_of_1x(tmp_path / "checkpoints" / "Cosmos-Predict1-4B")
    data = write_v2(tmp_path / "data" / "val_v2.0", "val", ((34,),))
    flags = "--checkpoint_dir checkpoints --ar_model_dir Cosmos-Predict1-4B --input_type tokens "
    flags += f"--input_tokens_dir {data}/ --top_p 0.8 --temperature 1.0 "
    flags += "--video_save_name autoregressive-4b1-tokens --only_eval"
    # The command as it is, but for the rollout, which takes minutes on one core.
    command = ["evaluate.py", "onex", *flags.split()]
    finished = run_script(
        [*command, "--parts", NEXT_8_FRAMES, "--max_windows", "1"],
        cwd=tmp_path,
        timeout_seconds=600,
    )
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "evaluation" / "onex" / "autoregressive-4b1-tokens"
    found = json.loads((folder / "metrics.json").read_text())["figures"][NEXT_8_FRAMES]
    assert found["num_tokens"] == 1024 and found["num_given_tokens"] == 2048
    # Random tokens and a model that knows none of them: a little above the uniform guess.
    assert np.log(64000) < found["nats_per_token"] < np.log(64000) + 1
    os.truncate(data / "video_0.bin", 100)
    finished = run_script(command, cwd=tmp_path)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1
    assert "video_0.bin has 100 bytes, expected 24576" in finished.stderr
    shutil.rmtree(data)
    finished = run_script(command, cwd=tmp_path)
    assert finished.returncode == 2 and finished.stderr.count("\n") == 1


@pytest.mark.slow
def test_all_figures_at_the_real_size(tmp_path: Path) -> None:
    model = make_model_of_1x(tmp_path / "model")
    data = write_v2(tmp_path / "data", "train", ((34,),))
    metrics = run(make_config(data, tmp_path / "out", ar_model_dir=str(model)))
    figures = metrics["figures"]
    assert [figures[part]["num_tokens"] for part in PARTS] == [2048, 3072, 3072]
    for part in PARTS:
        assert np.log(64000) < figures[part]["nats_per_token"] < np.log(64000) + 1
