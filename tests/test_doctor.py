"""The self-check passes on this machine, and fails where it must."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.distributed_run import run_script
from safetensors.torch import load_file, save_file

from cosmos_posttrain import doctor
from cosmos_posttrain.inference.decode_state import DecodeState
from cosmos_posttrain.installation import Installed
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.tokenizer.network import DVNetwork
from cosmos_posttrain.video import choice


@pytest.mark.slow
@pytest.mark.distributed
def test_all_checks_pass() -> None:
    finished = run_script(["-m", "cosmos_posttrain.doctor"], timeout_seconds=200)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    last = finished.stdout.strip().splitlines()[-1]
    assert "0 failed" in last
    assert int(last.split()[0]) >= 9


@pytest.mark.gpu
def test_all_checks_pass_on_a_gpu() -> None:
    finished = run_script(["-m", "cosmos_posttrain.doctor"], timeout_seconds=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "on cuda" in " ".join(finished.stdout.split())
    assert "0 failed" in finished.stdout.strip().splitlines()[-1]


def test_float32_has_all_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32, which cuDNN uses by itself, makes one of the 72 indices differ (emulated on a CPU)."""
    seen = []

    def watch(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            allowed = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
            seen.append((name, *allowed))
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    watch(DVNetwork, "encode")
    watch(DVNetwork, "decode")
    watch(ARModel, "logits")
    watch(DecodeState, "feed")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        results = [*doctor.check_tokenizer(), *doctor.check_ar("torch", "float32", 1)]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert {result.status for result in results} == {"PASS"}
    assert {name for name, *_ in seen} == {"encode", "decode", "logits", "feed"}
    assert {tuple(allowed) for _, *allowed in seen} == {(False, "highest")}
    assert torch.backends.cudnn.allow_tf32


def test_a_wrong_result_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = tmp_path / "case"
    shutil.copytree(doctor.AR_CASE, case)
    golden = load_file(case / "io.safetensors")
    save_file({**golden, "logits": golden["logits"] + 1e-4}, case / "io.safetensors")
    monkeypatch.setattr(doctor, "AR_CASE", case)
    logits, greedy = doctor.check_ar("torch", "float32", 1)
    assert (logits.status, greedy.status) == ("FAIL", "PASS")
    assert logits.difference == pytest.approx(1e-4, rel=0.1)


def test_a_check_that_raises_fails_alone() -> None:
    def run() -> Iterator[doctor.Result]:
        yield doctor.Result("first", "PASS")
        raise RuntimeError("no luck\nat all")

    first, second = doctor._guarded("second", run)
    assert first.status == "PASS"
    assert (second.check, second.status) == ("second", "FAIL")
    assert second.detail == "RuntimeError: no luck"


def test_video_is_written_and_read(monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = doctor.check_video()
    assert result.status == "PASS", result
    monkeypatch.setenv(choice.VARIABLE, "opencv")
    (result,) = doctor._guarded("video", doctor.check_video)
    assert result.status == "FAIL" and "it may be pyav or torchcodec" in result.detail


def test_the_tables_say_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """Advice is shown as it is: brackets are no markup."""
    rows = [Installed("nemo_run", "not installed", "pip install '.[launch]'")]
    doctor._print_tables(rows, [])
    assert "pip install '.[launch]'" in capsys.readouterr().out
    assert doctor.versions()[0].name == "python"


@pytest.mark.parametrize("name", ["torch", "numpy"])
def test_without_what_it_needs_it_still_says_what_is_there(name: str) -> None:
    """As where it is not installed, or cannot be loaded."""
    code = f"import sys; sys.modules[{name!r}] = None\nfrom cosmos_posttrain import doctor\n"
    code += "sys.argv = ['doctor']\nsys.exit(doctor.main())"
    finished = run_script(["-c", code], timeout_seconds=100)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert "Traceback" not in finished.stderr
    last = finished.stdout.strip().splitlines()[-1]
    assert last == f"{name} cannot be imported, so nothing was checked"
    assert "megatron-core" in finished.stdout


def test_what_is_not_finite_is_no_match() -> None:
    nothing = torch.tensor([float("nan")])
    assert doctor._max_difference(nothing, torch.zeros(1)) == float("inf")


def test_shipped_cases_are_small() -> None:
    files = [path for path in doctor.GOLDEN_DIR.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1.5e6
