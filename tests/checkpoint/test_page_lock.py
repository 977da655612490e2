"""Page-locked memory: a refusal stays without consequences, and what was locked is given back."""

from __future__ import annotations

import pytest
import torch

from cosmos_posttrain.checkpoint.host_copy import HostCopy
from cosmos_posttrain.checkpoint.page_lock import PageLock
from cosmos_posttrain.checkpoint.pieces import Piece

ALREADY, NOT_REGISTERED, INVALID = 712, 713, 1


class Runtime:
    """CUDA's rules for these calls, where there is no CUDA: each error is kept until asked for."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.last_error = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if size == 0:
            return self._say(INVALID)
        if address in self.held:
            return self._say(ALREADY)
        self.held[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.held.pop(address, None) else self._say(NOT_REGISTERED)

    def _say(self, code: int) -> int:
        self.last_error = code
        return code

    def run_kernel(self) -> None:
        """As torch: it looks at the last error behind the launch, which clears it."""
        code, self.last_error = self.last_error, 0
        if code:
            raise RuntimeError(f"CUDA error {code}")


def test_a_refusal_is_said_and_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    runtime, memory = Runtime(), torch.zeros(4096, dtype=torch.uint8)
    first = PageLock(memory, runtime, runtime.run_kernel)
    assert first.is_held and runtime.held == {memory.data_ptr(): 4096}
    assert capsys.readouterr().out == ""
    second = PageLock(memory, runtime, runtime.run_kernel)
    assert not second.is_held and runtime.last_error == 0
    assert "could not be page-locked (CUDA error 712)" in capsys.readouterr().out
    second.release()  # which holds nothing
    assert runtime.held
    first.release()
    first.release()
    assert not runtime.held and runtime.last_error == 0


def test_a_failed_release_is_forgotten() -> None:
    runtime, memory = Runtime(), torch.zeros(4096, dtype=torch.uint8)
    lock = PageLock(memory, runtime, runtime.run_kernel)
    runtime.held.clear()
    lock.release()
    assert runtime.last_error == 0


def test_no_memory_is_not_locked() -> None:
    runtime = Runtime()
    lock = PageLock(torch.empty(0, dtype=torch.uint8), runtime, runtime.run_kernel)
    lock.release()
    assert not lock.is_held and not runtime.held and runtime.last_error == 0


@pytest.mark.gpu
def test_the_gpu_works_behind_a_refusal() -> None:
    runtime, memory = torch.cuda.cudart(), torch.zeros(2**20, dtype=torch.uint8)
    first, second = PageLock(memory, runtime), PageLock(memory, runtime)
    assert first.is_held and not second.is_held
    assert memory.is_pinned() and torch.ones(4, device="cuda").sum().item() == 4
    first.release()
    third = PageLock(memory, runtime)
    assert third.is_held
    third.release()


@pytest.mark.gpu
def test_two_copies_one_after_the_other() -> None:
    values = torch.arange(1000.0, device="cuda")
    for _ in range(2):
        pieces = [Piece("a", (1000,), ([0], values))]
        copy = HostCopy(pieces)
        assert torch.equal(copy.take(pieces)[0].box[1], values.cpu())
        copy.close()
    HostCopy([]).close()
