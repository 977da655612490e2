"""Processes of one start find one another in a store full of what earlier starts left."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed
from helpers.distributed_run import run_script

from cosmos_posttrain.distributed import meeting
from cosmos_posttrain.errors import RankError


def test_the_living_agree_on_a_word_that_the_dead_did_not_have() -> None:
    store, words = torch.distributed.HashStore(), set()
    # A start of which rank 2 was killed before it came, and one that met.
    store.set("word", "old")
    store.set("answer/old/1", "dead")
    for killed_rank in (None, 2, 1, None, None):
        end = time.monotonic() + (30 if killed_rank is None else 1)
        with ThreadPoolExecutor(3) as threads:
            # The quicker ones find the last start's word.
            found = [
                threads.submit(meeting._answer, store, rank, end)
                for rank in (1, 2)
                if rank != killed_rank
            ]
            time.sleep(0.1)
            found.append(threads.submit(meeting._ask, store, 3, end))
            if killed_rank is None:
                (word,) = {future.result() for future in found}
                assert word not in words
                words.add(word)
            else:
                errors = [type(future.exception()) for future in found]
                assert errors == [RankError, RankError]
    assert len(words) == 3


def test_who_is_missing_is_said() -> None:
    store = torch.distributed.HashStore()
    with pytest.raises(RankError, match="3 of 4 processes did not come to the meeting"):
        meeting._ask(store, 4, time.monotonic() + 0.1)
    with pytest.raises(RankError, match="rank 0 did not come"):
        meeting._answer(store, 1, time.monotonic() + 0.1)
    # A meeting of others, whose word is still there.
    word = store.get("word").decode()
    store.set(f"met/{word}", json.dumps(["another answer"]))
    with pytest.raises(RankError, match="rank 0 did not come"):
        meeting._answer(store, 1, time.monotonic() + 0.1)


STARTS = {
    "preparation": "from cosmos_posttrain.prepare.runners import PreparationRanks as Ranks\n"
    "Ranks().decide(lambda: None, gather_first=True)",
    "tokenizer training": "import torch\n"
    "from cosmos_posttrain.tokenizer_training.parallel import DataParallelRanks as Ranks\n"
    "Ranks.from_environment().start(torch.device('cpu'))",
}
RESTARTED = """
import os, signal, time
is_first_start = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if os.environ["RANK"] == "0" and not is_first_start:
    time.sleep(2)  # the other is quicker, and finds what the killed ones left
{start}
if is_first_start:
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("room", STARTS)
def test_restarted_processes_meet_anew(tmp_path: Path, room: str) -> None:
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED.format(start=STARTS[room]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = run_script([*launcher, "--max-restarts=1", script], timeout_seconds=300)
    assert finished.returncode == 0, finished.stderr
