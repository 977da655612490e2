"""``--engine nemo`` beside the direct engine, by their command lines; in make nemo-env's Python."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from helpers.launched_run import LaunchedRun
from helpers.nemo_case import CLOSE, MAX_STEPS, NEEDS_NEMO, Train, crashed, finish, words_of
from helpers.run_case import losses
from helpers.wandb_file import read_launches

from cosmos_posttrain.checkpoint import pieces
from cosmos_posttrain.checkpoint.context import list_checkpoints
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.distributed.cpu_device import cpu_device
from cosmos_posttrain.runlog import read_rows

pytestmark = NEEDS_NEMO


@pytest.mark.parametrize(
    ("size", "kind"), [(1, "base"), (2, "base"), (2, "text")], ids=["tp1", "tp2", "video2world"]
)
def test_both_engines_give_one_curve(size: int, kind: str, train: Train) -> None:
    direct, nemo = (train(engine, size, kind) for engine in ("direct", "nemo"))
    assert len(losses(direct)) == MAX_STEPS
    assert losses(nemo) == pytest.approx(losses(direct), rel=CLOSE)
    ours, theirs = (read_rows(run / "default" / "metrics.jsonl") for run in (direct, nemo))
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in {"grad_norm", "lr", "consumed_samples", "epoch", "val_loss"} & one.keys():
            assert other[key] == pytest.approx(one[key], rel=10 * CLOSE), key
    assert "val_loss" in ours[-1]
    assert [p.name for p in list_checkpoints(nemo)] == [p.name for p in list_checkpoints(direct)]


def test_boards_get_the_rows(train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("nemo", 1) / "default"
    board = EventAccumulator(str(run / "tb_logs"))
    board.Reload()
    curve = [(event.step, event.value) for event in board.Scalars("reduced_train_loss")]
    assert curve == list(enumerate(pytest.approx(value, rel=1e-6) for value in losses(run.parent)))
    (launch,) = read_launches(run)
    assert launch.run_id == (run / "wandb_id.txt").read_text().strip()
    assert [row["reduced_train_loss"] for row in launch.history] == losses(run.parent)


def test_our_loader_reads_what_nemo_wrote(train: Train) -> None:
    """Bit for bit what Megatron's own loader finds there."""
    from megatron.core.dist_checkpointing import load_plain_tensors

    checkpoint = list_checkpoints(train("nemo", 2))[-1]
    source = open_source(checkpoint)
    assert source.config == open_source(list_checkpoints(train("direct", 2))[-1]).config
    assert source.data is not None and source.data.contract is not None
    own = list(pieces.to_write(load_model(checkpoint).module, None))
    with cpu_device():
        theirs = load_plain_tensors(str(checkpoint / "weights"))
    for piece in own:
        place, numbers = piece.box
        region = tuple(slice(i, i + n) for i, n in zip(place, numbers.shape, strict=True))
        assert torch.equal(numbers, theirs[piece.key][region]), piece.key
    weights = {key for key in theirs if key.startswith("module.")}
    assert weights == {piece.key for piece in own}


@pytest.mark.parametrize("writer", ["nemo", "direct"])
@pytest.mark.parametrize("reader", ["nemo", "direct"])
def test_either_engine_goes_on(
    writer: str, reader: str, data: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    """Weights, optimizer and order are exact: the rest of the curve is the uninterrupted one."""
    if writer == reader == "direct":
        pytest.skip("tests/training has it")
    size = 1 if writer == reader else 2
    whole = train(writer, size)
    log_dir = crashed(whole, tmp_path / "run")
    words = words_of(data, "base", log_dir, reader, size)
    assert "resuming" in finish(words, size)
    # From exact state the engines' rounding parts them again, over ten steps.
    rel = 1e-6 if writer == reader else CLOSE
    assert losses(log_dir) == pytest.approx(losses(whole), rel=rel)
    eleventh = [losses(run)[10] for run in (log_dir, whole)]
    assert eleventh[0] == pytest.approx(eleventh[1], rel=1e-6)
    rows = read_rows(log_dir / "default" / "metrics.jsonl")
    assert [row["consumed_samples"] for row in rows] == [4 * n for n in range(1, MAX_STEPS + 1)]
    assert "nothing to do" in finish(words, size)


def test_a_signal_ends_a_run_that_starts_from_a_checkpoint(
    data: dict[str, Path], train: Train, tmp_path: Path
) -> None:
    start = list_checkpoints(train("direct", 2))[0]
    words = words_of(data, "base", tmp_path / "direct", "direct", 2)
    words += ["--model_path", start, "--save_every_n_steps", 100]
    finish([*words, "--max_steps", 2], 2)
    words[words.index("--log_dir") + 1] = log_dir = tmp_path / "nemo"
    words[words.index("--engine") + 1] = "nemo"
    more = ["--max_steps", "100000"]
    with LaunchedRun([*words, *more], log_dir, "--standalone", "--nproc_per_node=2") as run:
        run.wait_for_steps(2)
        run.signal(0, signal.SIGTERM)
        assert run.wait(120) == 1, run.output
    assert "stopped by SIGTERM after" in run.output
    (checkpoint,) = list_checkpoints(log_dir)
    rows = read_rows(run.metrics)
    state = json.loads((checkpoint / "context" / "state.json").read_text())
    assert state["completed_steps"] == len(rows)
    assert rows[0]["reduced_train_loss"] == pytest.approx(losses(tmp_path / "direct")[0], rel=1e-6)
