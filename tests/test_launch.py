"""This process among those that were launched: what it is told, how it ends."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from cosmos_posttrain.launch import StopSignal


@pytest.fixture
def stop() -> Iterator[StopSignal]:
    found = StopSignal()
    yield found
    found.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_is_noted_and_the_former_handler_comes_back(
    stop: StopSignal, number: signal.Signals
) -> None:
    assert stop.requested is None
    os.kill(os.getpid(), number)
    os.kill(os.getpid(), signal.SIGTERM)  # the launcher passes on what came to all
    assert stop.requested == number.name
    stop.close()
    assert signal.getsignal(number) == signal.SIG_DFL


def test_a_forked_helper_dies_of_the_signal(stop: StopSignal) -> None:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"!")
        time.sleep(60)
        os._exit(0)
    assert os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGTERM and stop.requested is None


def test_outside_the_main_thread_no_signal_is_noted() -> None:
    made: list[StopSignal] = []
    thread = threading.Thread(target=lambda: made.append(StopSignal()))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    made[0].close()
