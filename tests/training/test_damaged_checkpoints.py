"""A run goes on from the newest checkpoint that is whole, and keeps the damaged ones aside."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.distributed_run import run_distributed
from helpers.run_case import losses, make_config, run

from cosmos_posttrain import launch
from cosmos_posttrain.errors import CheckpointError, UnreadableCheckpointError
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.fallback import Candidates


@pytest.fixture(scope="module")
def finished(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, checkpoints after 2, 4 and 6."""
    log_dir = tmp_path_factory.mktemp("finished") / "run"
    run(make_config(tokens, log_dir, max_steps=6, save_every_n_steps=2))
    return log_dir


def checkpoint(log_dir: Path, step: int) -> Path:
    return next((log_dir / "default" / "checkpoints").glob(f"*step={step}"))


def pieces(checkpoint: Path) -> Path:
    return next((checkpoint / "weights").glob("*.distcp"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    """In the middle of the file, where the numbers are."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated numbers": lambda folder: cut(pieces(folder)),
    "missing numbers": lambda folder: pieces(folder).unlink(),
    "truncated index": lambda folder: cut(folder / "weights" / ".metadata"),
    "missing index": lambda folder: (folder / "weights" / ".metadata").unlink(),
    "truncated values": lambda folder: cut(folder / "weights" / "common.pt"),
    "missing form": lambda folder: (folder / "weights" / "metadata.json").unlink(),
    "missing weights": lambda folder: shutil.rmtree(folder / "weights"),
    "missing model": lambda folder: (folder / "context" / "model.json").unlink(),
    "damaged model": lambda folder: (folder / "context" / "model.json").write_text("{"),
    "missing state": lambda folder: (folder / "context" / "state.json").unlink(),
    "empty state": lambda folder: (folder / "context" / "state.json").write_text("{}"),
    "damaged data": lambda folder: (folder / "context" / "data.json").write_bytes(b"\0" * 9),
    "truncated row": lambda folder: cut(folder / "context" / "metrics.json"),
    "nothing in it": lambda folder: [shutil.rmtree(path) for path in folder.iterdir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_the_newest_that_is_whole_is_chosen(finished: Path, tmp_path: Path, kind: str) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert Candidates(tmp_path).newest() == checkpoint(tmp_path, 5)
    DAMAGE[kind](checkpoint(tmp_path, 5))
    assert Candidates(tmp_path).newest() == checkpoint(tmp_path, 3)


class Refusing(io.BufferedReader):
    """An open file from which nothing can be read."""

    error: BaseException = OSError(5, "Input/output error")

    def readinto(self, buffer: Any, /) -> int:
        raise self.error


def refuse_to_read(patch: pytest.MonkeyPatch, suffix: str, error: BaseException) -> None:
    """As a network file system that does not answer: names and sizes are there, bytes are not."""
    open_file = Path.open

    def refuse(path: Path, mode: str = "r", **options: str) -> object:
        if path.suffix != suffix:
            return open_file(path, mode, **options)  # type: ignore[call-overload]
        if isinstance(error, FileNotFoundError):
            raise error
        file = Refusing(io.FileIO(path))
        file.error = error
        return file

    patch.setattr(Path, "open", refuse)


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(5, "Input/output error"), "Input/output error"), (MemoryError(), "not enough host")],
    ids=["disk", "memory"],
)
def test_what_cannot_be_read_is_not_called_damaged(
    tokens: Path, finished: Path, tmp_path: Path, error: BaseException, words: str
) -> None:
    """It may be read in a minute, and is the checkpoint that the run then goes on from."""
    log_dir = tmp_path / "run"
    shutil.copytree(finished, log_dir)
    config = make_config(tokens, log_dir, max_steps=8, save_every_n_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        refuse_to_read(patch, ".distcp", error)
        with pytest.raises(UnreadableCheckpointError, match=f"cannot be read: .*{words}"):
            run(config)
    assert not (log_dir / "default" / "damaged_checkpoints").exists()
    assert Candidates(log_dir).newest() == checkpoint(log_dir, 5)
    run(config)
    assert losses(log_dir)[:6] == losses(finished)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_tables_that_cannot_be_read_are_not_called_damaged(
    finished: Path, tmp_path: Path, name: str
) -> None:
    """The first page of a process's memory is a file that opens, and whose bytes give EIO."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    path = checkpoint(tmp_path, 5) / "weights" / name
    path.unlink()
    path.symlink_to("/proc/self/mem")
    with pytest.raises(UnreadableCheckpointError, match="cannot be read: Input/output error;"):
        Candidates(tmp_path).newest()


def test_a_best_checkpoint_whose_row_cannot_be_read_is_kept(
    tokens: Path, finished: Path, tmp_path: Path
) -> None:
    log_dir = tmp_path / "run"
    shutil.copytree(finished, log_dir)
    row = checkpoint(log_dir, 1) / "context" / "metrics.json"
    row.unlink()
    row.symlink_to("/proc/self/mem")
    run(make_config(tokens, log_dir, max_steps=8, save_every_n_steps=2, keep_last_n=1))
    assert len(list(checkpoint(log_dir, 1).parent.iterdir())) == 4


def test_a_truncated_checkpoint_costs_only_its_steps(
    tokens: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_dir = tmp_path / "run"
    shutil.copytree(finished, log_dir)
    newest, before = checkpoint(log_dir, 5), checkpoint(log_dir, 3)
    cut(pieces(newest))
    left = pieces(newest).read_bytes()
    config = make_config(tokens, log_dir, max_steps=6, save_every_n_steps=2)
    run(config)
    warning = capsys.readouterr().err
    assert f"warning: {newest} is damaged and was moved" in warning
    assert "is truncated" in warning and f"goes on from {before}." in warning
    aside = log_dir / "default" / "damaged_checkpoints" / newest.name
    assert pieces(aside).read_bytes() == left
    assert losses(log_dir) == losses(finished)
    # The step is saved again, and may be damaged again.
    cut(pieces(newest))
    run(config)
    assert aside.with_name(f"{newest.name}.2").is_dir() and pieces(aside).read_bytes() == left
    assert losses(log_dir) == losses(finished)


def test_a_damaged_row_of_an_older_checkpoint_ends_no_run(
    tokens: Path, finished: Path, tmp_path: Path
) -> None:
    """Its validation loss is unknown then: it is not among the best."""
    log_dir = tmp_path / "run"
    shutil.copytree(finished, log_dir)
    cut(checkpoint(log_dir, 1) / "context" / "metrics.json")
    run(make_config(tokens, log_dir, max_steps=8, save_every_n_steps=2, save_top_k=3))
    assert len(losses(log_dir)) == 8
    left = {path.name.split("=")[-1] for path in checkpoint(log_dir, 7).parent.iterdir()}
    assert left == {"3", "5", "7"}


def run_after_a_lag(config: TrainConfig) -> str:
    """At first a machine does not see the numbers yet, which ends the run on all of them."""
    with pytest.MonkeyPatch.context() as patch:
        if launch.rank() == 1:
            refuse_to_read(patch, ".distcp", FileNotFoundError(2, "No such file or directory"))
        with pytest.raises(UnreadableCheckpointError, match=r"^rank 1: .* lacks __0_0\.distcp"):
            run(config)
    assert not (Path(config.log_dir) / "default" / "damaged_checkpoints").exists()
    return run(config)


@pytest.mark.distributed
def test_changed_numbers_are_found_on_any_rank(
    tokens: Path, finished: Path, tmp_path: Path
) -> None:
    """Nothing about sizes and tables is wrong, and torch itself would load them."""
    log_dir = tmp_path / "run"
    shutil.copytree(finished, log_dir)
    flip_a_bit(pieces(checkpoint(log_dir, 5)))
    assert Candidates(log_dir).newest() == checkpoint(log_dir, 5)
    config = make_config(tokens, log_dir, max_steps=6, save_every_n_steps=2)
    run_distributed(run_after_a_lag, 2, config)
    assert (log_dir / "default" / "damaged_checkpoints" / "epoch=3-step=5").is_dir()
    for ours, theirs in zip(losses(log_dir), losses(finished), strict=True):
        assert abs(ours - theirs) <= 1e-6 * theirs


def test_nothing_is_changed_where_no_checkpoint_is_whole(
    tokens: Path, finished: Path, tmp_path: Path
) -> None:
    log_dir = tmp_path / "run"
    shutil.copytree(finished, log_dir)
    flip_a_bit(pieces(checkpoint(log_dir, 5)))
    for step in (1, 3):
        cut(pieces(checkpoint(log_dir, step)))
    names = sorted(path.name for path in (log_dir / "default" / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=r"than was written.*no other checkpoint"):
        run(make_config(tokens, log_dir, max_steps=8))
    assert sorted(p.name for p in (log_dir / "default" / "checkpoints").iterdir()) == names
    assert losses(log_dir) == losses(finished)
