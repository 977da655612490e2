"""Files that are whole or not there, and folders with one writer, also among real processes."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cosmos_posttrain import files
from cosmos_posttrain.errors import DatasetError, OutputFolderError

# Holds a folder, says so, and goes on until its input ends.
HOLDER = """
import sys
from pathlib import Path
from cosmos_posttrain import files
with files.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds ``out``, a folder that it has made."""
    with start(tmp_path / "out") as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate(timeout=60)
    assert process.returncode == 0


# Writing.


def test_an_error_keeps_the_old_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and json.loads(path.read_text()) == {"a": 1}
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["a.json"]
    files.write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_what_killed_writers_leave_is_known_and_removed(tmp_path: Path) -> None:
    for path in (
        files.temporary_path(tmp_path / "a.bin"),
        files.temporary_path(tmp_path / "b.bin", is_shared=True),
    ):
        assert files.is_leftover(path.name)
        assert files.final_name(path.name) in ("a.bin", "b.bin")
        path.touch()
    within = files.temporary_path(files.temporary_path(tmp_path / "a.bin"))
    assert files.final_name(within.name) == "a.bin"
    folder = files.temporary_path(tmp_path / "c")
    folder.mkdir()
    (folder / "inside").touch()
    (tmp_path / "d.tmp-1-e").touch()
    (tmp_path / files.LOCK_FILE).touch()
    known = {"a.bin", "b.bin", "c"}
    assert files.foreign_names(tmp_path, known.__contains__) == ["d.tmp-1-e"]
    files.remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [files.LOCK_FILE, "d.tmp-1-e"]
    files.remove_leftovers(tmp_path / "absent")
    assert files.foreign_names(tmp_path / "absent", known.__contains__) == []


def test_json_has_no_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    value = {"a": [math.nan, {"b": (math.inf, 1.5)}], "c": -math.inf, "d": "é"}
    text = files.json_text(value)
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"a": [None, {"b": [None, 1.5]}], "c": None, "d": "é"}
    files.write_json_lines(tmp_path / "rows.jsonl", [{"x": math.nan}, {"x": 1}])
    assert (tmp_path / "rows.jsonl").read_text() == '{"x": null}\n{"x": 1}\n'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing; copy it again."),
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[1]", "holds no JSON object; copy it again."),
    ],
    ids=["absent", "empty", "bytes", "deep", "list"],
)
def test_json_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        files.read_json(path, DatasetError, "copy it again")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256_of_file(tmp_path / "a") == known
    assert files.sha256_of_json({"a": 1, "b": [2]}) == files.sha256_of_json({"b": [2], "a": 1})


# Output folders.


def test_folders_that_cannot_be_written_to_are_refused_and_none_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for path, words in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "is not a folder"),
        (tmp_path / "link", "is a link to nowhere"),
    ):
        with pytest.raises(OutputFolderError, match=words):
            files.check_writable(path)
    files.check_writable(tmp_path / "new" / "folder", "--output_dir")
    assert sorted(os.listdir(tmp_path)) == ["file", "link"]


def in_a_child(function: Callable[[], None]) -> str:
    """What a function raises in a forked process that is nobody's (where this one is root's)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            function()
            os.write(writing, b"nothing")
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as answer:
        return answer.read()


def test_missing_permissions_are_a_sentence(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    expected = "OutputFolderError: the output folder .*cannot be written to: .* may not be written"
    for path in (closed, closed / "new" / "folder"):
        assert re.match(expected, in_a_child(lambda p=path: files.check_writable(p)))

    def lock() -> None:
        with files.locked(closed / "new"):
            pass

    assert in_a_child(lock).startswith(f"OutputFolderError: {closed}/new cannot be written to (")


def test_a_disk_that_is_too_full_is_refused_before_writing(tmp_path: Path) -> None:
    files.check_free_space(tmp_path / "new", 1, "a checkpoint")
    with pytest.raises(OutputFolderError, match=r"a checkpoint needs 1000000000\.000 GB, but only"):
        files.check_free_space(tmp_path / "new", 10**18, "a checkpoint")
    assert not (tmp_path / "new").exists()


# One writer.


def test_a_second_process_is_refused_until_the_first_ends(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    folder = tmp_path / "out"
    with pytest.raises(OutputFolderError, match=rf"another process \(process {holder.pid} on "):
        files.locked(folder).__enter__()
    (folder / "result").touch()
    finish(holder)
    with files.locked(folder):
        pass
    assert os.listdir(folder) == ["result"]


def test_a_killed_owner_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert os.listdir(tmp_path / "out") == [files.LOCK_FILE]
    again = pytest.raises(OutputFolderError, match="by this process already")
    with files.locked(tmp_path / "out"), again:
        files.locked(tmp_path / "x" / ".." / "out").__enter__()
    assert os.listdir(tmp_path / "out") == []


def test_a_folder_into_which_nothing_was_written_is_removed_again(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path / "a" / "b"):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
    with pytest.raises(ZeroDivisionError), files.locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "kept").touch()
        raise ZeroDivisionError
    assert os.listdir(tmp_path / "a" / "b") == ["kept"]


def test_a_file_system_without_locks_still_refuses_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with files.locked(tmp_path / "out"):
        assert os.listdir(tmp_path / "out") == []
        with pytest.raises(OutputFolderError, match="by this process already"):
            files.locked(tmp_path / "out").__enter__()
    assert os.listdir(tmp_path) == []


def test_another_failure_to_lock_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "lockf", fail)
    with pytest.raises(OutputFolderError, match=r"cannot be written to \(Input/output error\)"):
        files.locked(tmp_path).__enter__()
    monkeypatch.undo()
    with files.locked(tmp_path):
        pass


def test_a_lock_on_a_file_that_its_owner_has_just_removed_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = fcntl.lockf, iter(range(10))

    def lock_too_late(descriptor: int, operation: int) -> None:
        if next(calls) == 0:  # between opening and locking
            (tmp_path / files.LOCK_FILE).unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "lockf", lock_too_late)
    with files.locked(tmp_path):
        with start(tmp_path) as second:
            _, said = second.communicate(timeout=60)
        assert "is being written by another process" in said
    assert next(calls) == 2


def test_a_forked_helper_neither_holds_nor_frees_the_lock(tmp_path: Path) -> None:
    child = 0
    try:
        with files.locked(tmp_path / "out"):
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            assert files._locked
        with files.locked(tmp_path / "out"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
