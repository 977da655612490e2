"""The service as a process: its command line, its signals, and several processes with one model."""

from __future__ import annotations

import base64
import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import guardrail_case, infer_case
from helpers.distributed_run import REPOSITORY_DIR, kill_tree
from helpers.service import Client, running, small_config
from PIL import Image

from cosmos_posttrain import launch
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.serve import __main__, server
from cosmos_posttrain.serve.config import ServeConfig, is_loopback, validate

ARGUMENTS = [
    *("-m", "cosmos_posttrain.serve", "--port", "0", "--ar_model_dir", "random:tiny"),
    *("--encoder_path", "tiny-dv4x8x8", "--num_context_frames", "17"),
    *("--height", "64", "--width", "96", "--disable_guardrail"),
]


@dataclass
class Process:
    """A service in processes of its own."""

    popen: subprocess.Popen[str]
    client: Client
    folder: Path

    def end(self, number: int) -> tuple[int, str]:
        """Exit code and standard error after a signal."""
        self.popen.send_signal(number)
        _, said = self.popen.communicate(timeout=60)
        return self.popen.returncode, said


@contextlib.contextmanager
def started(folder: Path, *launcher: str) -> Iterator[Process]:
    folder.mkdir()
    with subprocess.Popen(
        [sys.executable, *launcher, *ARGUMENTS],
        cwd=REPOSITORY_DIR,
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as popen:
        try:
            assert popen.stdout is not None
            said = popen.stdout.readline()
            assert said.startswith("serving random:tiny at http://127.0.0.1:"), said
            port = int(said.partition("/ (")[0].rpartition(":")[2])
            yield Process(popen, Client(port), folder)
        finally:
            kill_tree(popen.pid)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_service_at_once_and_nothing_is_left(tmp_path: Path, number: int) -> None:
    image = infer_case.write_input(tmp_path / "bar.mp4")
    with started(tmp_path / "tmp") as process:
        answer = process.client.post("bar.mp4", image.read_bytes(), num_input_frames=1)
        while b'"given"' not in answer.readline():
            pass
        assert len(list(process.folder.glob("cosmos-serve-*/*"))) == 1
        start = time.monotonic()
        assert process.end(number) == (0, "")
        assert time.monotonic() - start < 30
        assert b'"cancelled"' in answer.read()
        assert list(process.folder.glob("cosmos-serve-*")) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_processes_that_share_the_model_follow_the_first(tmp_path: Path) -> None:
    path = infer_case.write_input(tmp_path / "bar.mp4")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    with started(tmp_path / "tmp", *torchrun) as process:
        client = process.client
        assert client.refusal("bar.mp4", b"text")[0] == 422
        record = client.make(path, seed=3)[-1]["record"]
        assert record["tensor_model_parallel_size"] == 2
        assert record["command"].startswith("torchrun --nproc-per-node=2 infer.py ")
        # One that is given up leaves all of them ready for the next.
        answer = client.post("bar.mp4", path.read_bytes(), num_input_frames=1)
        name = answer.readline().decode().partition('"name": "')[2].partition('"')[0]
        while b'"frames"' not in answer.readline():
            pass
        client.ask("DELETE", f"/api/clips/{name}")
        assert b'"cancelled"' in answer.read()
        again = client.make(path, seed=3)[-1]["record"]
        assert again["tokens_sha256"] == record["tokens_sha256"]
        process.end(signal.SIGTERM)
        workers = [p for p in psutil.process_iter() if _is_of(p, process.folder)]
        assert workers == []
    alone = Session(small_config()).generate(Request(path=path, seed=3, top_p=0.8))
    assert alone.record["tokens_sha256"] == record["tokens_sha256"]


def _is_of(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.environ().get("TMPDIR") == str(folder)
    return False


def test_the_guardrail_is_asked_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in guardrail_case.stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)
    config = small_config(
        ar_model_dir="random:tiny-video2world",
        text_encoder_path="tiny",
        encoder_path="tiny-dv8x16x16",
        disable_guardrail=False,
        guardrail_dir=str(guardrail_case.write_folder(tmp_path / "weights")),
    )
    path = infer_case.write_input(tmp_path / "bar.mp4")  # a sixteenth is bright
    with running(config, tmp_path / "service") as client:
        blocked = client.make(path, prompt="a customword ball")[-1]
        assert blocked["event"] == "failed" and "guardrail blocks the prompt" in blocked["problem"]
        lines = client.make(path, prompt="a ball rolls")
        assert lines[-1]["event"] == "done"
        assert "--guardrail_dir" in lines[-1]["record"]["command"]
        for line in lines:
            for jpeg in line.get("frames", []):
                assert _bright_share(jpeg) < 0.02  # JPEG rings around what was made black


def _bright_share(jpeg: str) -> float:
    image = Image.open(io.BytesIO(base64.b64decode(jpeg)))
    return float((np.asarray(image) > 200).mean())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"host": "0.0.0.0"}, r"--host 0\.0\.0\.0 can be reached from other machines and needs"),
        ({"host": "::"}, "needs --auth_token"),
        ({"auth_token": "short"}, "--auth_token must have at least 8"),
        ({"auth_token": "words with spaces"}, "--auth_token must not hold spaces"),
        ({"port": 70000}, "--port 70000 must be at most 65535"),
        ({"max_queue": 0, "max_upload_mb": 0}, "--max_queue 0 .*; --max_upload_mb 0"),
        ({"guardrail_dir": "x", "disable_guardrail": True}, "leave one out"),
    ],
)
def test_a_config_that_does_not_fit(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        validate(ServeConfig(**changes))


def test_which_addresses_are_of_this_machine() -> None:
    for host in ("127.0.0.1", "127.8.9.1", "localhost", "LOCALHOST", "::1", "[::1]"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "clips.example", "", "localhost.example"):
        assert not is_loopback(host)
    validate(ServeConfig(host="0.0.0.0", auth_token="a-secret-word"))


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with contextlib.closing(server.bind("127.0.0.1", 0)) as bound:
        bound.listen()
        port = bound.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port {port} cannot be listened on"):
            server.bind("127.0.0.1", port)


def test_bad_usage_is_one_sentence_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serve", "--guardrail_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        launch.run_cli(__main__.main)
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "has no blocklist/custom" in said and said.count("\n") == 1


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.setattr(sys, "argv", ["serve"])
    with pytest.raises(ConfigError, match=r"needs the package uvicorn; run pip install '\.\[serve"):
        __main__.main()


def test_processes_that_do_not_share_the_model_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "world_size", lambda: 2)
    with pytest.raises(ConfigError, match="must be the number of processes, 2"):
        server.open_session(small_config(tensor_model_parallel_size=1))
