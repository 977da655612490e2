"""Exit codes of run_cli, and who prints: rank 0 alone, one line, no traceback for users."""

from __future__ import annotations

import pytest

from cosmos_posttrain import errors, launch
from cosmos_posttrain.errors import (
    CosmosPosttrainError,
    NonFiniteLossError,
    PartialFailureError,
    UserError,
)
from cosmos_posttrain.launch import is_rank_zero, run_cli


def _raises(error: BaseException) -> int:
    raise error


def _exit_code_of(error: BaseException) -> int:
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: _raises(error))
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (1, 1), (7, 7)])
def test_the_returned_code_is_the_exit_code(
    returned: int | None, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(lambda: returned)
    assert stop.value.code == code
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (PartialFailureError("2 of 10 clips failed."), 1),
        (NonFiniteLossError("the loss is nan at step 3."), 1),
        (CosmosPosttrainError("anything else."), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_failures_of_the_job_do_not_look_like_bad_usage(error: BaseException, code: int) -> None:
    assert _exit_code_of(error) == code


def test_every_user_error_exits_with_2() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, UserError)
    ]
    assert len(kinds) >= 8
    assert {_exit_code_of(kind("width 500 is wrong; use 496.")) for kind in kinds} == {2}


def test_one_sentence_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    _exit_code_of(UserError("width 500 is not a multiple of 8; use 496 or 504."))
    captured = capsys.readouterr()
    assert captured.err == "error: width 500 is not a multiple of 8; use 496 or 504.\n"
    assert captured.out == ""


@pytest.mark.parametrize("rank", ["1", "7"])
def test_other_ranks_are_silent_and_exit_alike(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "_group", lambda: None)  # which an earlier test may have made
    monkeypatch.setenv("RANK", rank)
    assert not is_rank_zero()
    assert _exit_code_of(UserError("a sentence.")) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("rank", [None, "0"])
def test_rank_zero_and_plain_processes_speak(
    rank: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_rank_zero()
    _exit_code_of(UserError("a sentence."))
    assert capsys.readouterr().err == "error: a sentence.\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_cli(lambda: 1 // 0)
