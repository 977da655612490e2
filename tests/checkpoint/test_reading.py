"""What cannot be read is told apart from what is damaged, byte by byte."""

from __future__ import annotations

import io
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cosmos_posttrain.checkpoint import guard
from cosmos_posttrain.checkpoint.reading import NO_MEMORY, FileWindow, refusal
from cosmos_posttrain.checkpoint.torch_dist import TorchDistReader, TorchDistWriter
from cosmos_posttrain.errors import CheckpointError, UnreadableCheckpointError

KEY = "module.weight"


def write(folder: Path, tensor: torch.Tensor) -> Path:
    writer = TorchDistWriter(folder)
    writer.add(KEY, tensor)
    writer.finish({"step": 3})
    return folder / "__0_0.distcp"


@contextmanager
def memory_left(num_bytes: int) -> Iterator[None]:
    """The process gets no more address space than this beyond what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_too_little_memory_is_no_damage(tmp_path: Path) -> None:
    write(tmp_path, torch.zeros(2**25))  # 128 MB
    reader = TorchDistReader(tmp_path, verify=True)
    with memory_left(2**26), pytest.raises(UnreadableCheckpointError, match=NO_MEMORY):
        reader.read(KEY)
    assert reader.read(KEY).numel() == 2**25


def test_more_memory_than_the_file_has_is_damage() -> None:
    error = RuntimeError("can't allocate memory: you tried to allocate 4096 bytes. Error code 12")
    assert refusal(error) == refusal(error, 4096) == NO_MEMORY
    assert refusal(error, 4095) is None
    assert refusal(io.UnsupportedOperation("fileno")) is None
    with pytest.raises(OSError, match="Invalid argument") as invalid, open(__file__, "rb") as file:
        file.seek(-1)
    assert refusal(invalid.value) is None


def test_every_wrong_byte_of_a_piece_is_damage(tmp_path: Path) -> None:
    """Of its zip file's tables and of its pickle, too."""
    tensor = torch.arange(8.0)
    path = write(tmp_path, tensor)
    sound, found = path.read_bytes(), 0
    for place in range(0, len(sound), 3):
        path.write_bytes(sound[:place] + bytes([sound[place] ^ 0x41]) + sound[place + 1 :])
        try:
            assert torch.equal(TorchDistReader(tmp_path, verify=True).read(KEY), tensor)
        except CheckpointError as error:
            assert not isinstance(error, UnreadableCheckpointError), (place, error)
            found += 1
    assert found > 50


@pytest.mark.parametrize("name", [guard.METADATA_FILE, guard.COMMON_FILE])
def test_every_wrong_byte_of_a_table_is_damage_or_nothing(tmp_path: Path, name: str) -> None:
    write(tmp_path, torch.zeros(2))
    sound, found = (tmp_path / name).read_bytes(), 0
    read = guard.read_metadata if name == guard.METADATA_FILE else guard.read_common
    for place in range(len(sound)):
        data = sound[:place] + bytes([sound[place] ^ 0x41]) + sound[place + 1 :]
        (tmp_path / name).write_bytes(data)
        try:
            read(tmp_path)
        except CheckpointError as error:
            assert not isinstance(error, UnreadableCheckpointError), (place, error)
            found += 1
    assert found > 50


def test_a_window_keeps_the_systems_own_error(tmp_path: Path) -> None:
    """torch puts an AttributeError of its own in its place."""
    path = write(tmp_path, torch.zeros(64))
    with path.open("rb") as file, Path("/proc/self/mem").open("rb") as refuses:
        whole = FileWindow(file, 0, path.stat().st_size)
        guard.load(whole, "here", "is damaged")
        assert whole.problem is None
        with pytest.raises(UnreadableCheckpointError, match=r"^here cannot be read: Input/output"):
            guard.load(FileWindow(refuses, 0, 1000), "here", "is damaged")
        with pytest.raises(ValueError, match="before"):
            whole.seek(-1)
