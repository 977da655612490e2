"""The service with a real tiny model: clips, who waits, what is refused, and how it ends."""

from __future__ import annotations

import base64
import io
import json
import shlex
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import infer_case, service
from helpers.service import Client, running, small_config, wait_until
from PIL import Image

from cosmos_posttrain import cli
from cosmos_posttrain.inference import batch
from cosmos_posttrain.inference.config import FLAGS, InferConfig
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.serve import server
from cosmos_posttrain.video import probe, read_clips

NUM_FRAMES = 17
QUICK = {"encoder_path": "tiny-dv8x16x16", "height": 32, "width": 48}


@pytest.fixture(scope="module")
def session() -> Session:
    return server.open_session(small_config())


@pytest.fixture(scope="module")
def quick() -> Session:
    """Clips of few tokens, for tests in which nothing happens while one is generated."""
    return server.open_session(small_config(**QUICK))


@pytest.fixture
def quick_client(tmp_path: Path, quick: Session) -> Iterator[Client]:
    with running(small_config(**QUICK), tmp_path / "service", quick) as opened:
        yield opened


@pytest.fixture
def client(tmp_path: Path, session: Session) -> Iterator[Client]:
    with running(small_config(max_batch_size=1), tmp_path / "service", session) as opened:
        yield opened


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return infer_case.write_input(tmp_path_factory.mktemp("inputs") / "bar.mp4")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "bar.png"
    Image.fromarray(infer_case.moving_bar(1)[:, 0].permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture
def gate(session: Session, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, no frame is shown: what is generated goes on for as long."""
    opened, decode = threading.Event(), session.decode

    def waiting(tokens: torch.Tensor) -> torch.Tensor:
        assert opened.wait(service.PATIENCE_SECONDS)
        return decode(tokens)

    monkeypatch.setattr(session, "decode", waiting)
    yield opened
    opened.set()


def events(lines: list[dict[str, Any]]) -> list[str]:
    return [line["event"] for line in lines]


def pixels(jpeg: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(jpeg)))).astype(float)


def test_a_clip_appears_latent_frame_by_latent_frame(
    client: Client, clip: Path, tmp_path: Path
) -> None:
    lines = client.make(clip, seed=5, num_input_frames=5, temperature=0.9)
    names = events(lines)
    assert names[0] == "accepted" and names[-1] == "done"
    assert names.count("given") == 1 and names.count("frames") == 3
    shown = [line for line in lines if line["event"] == "frames"]
    assert [line["latents"] for line in shown] == [3, 4, 5]
    assert [line["first"] for line in shown] == [0, 9, 13]
    frames = [frame for line in shown for frame in line["frames"]]
    given = lines[names.index("given")]["frames"]
    assert (len(given), len(frames)) == (5, NUM_FRAMES)
    name = lines[0]["name"]
    status, content = client.ask("GET", lines[-1]["video"])
    assert status == 200
    (tmp_path / "made.mp4").write_bytes(content)
    info = probe(tmp_path / "made.mp4")
    assert (info.num_frames, info.height, info.width, info.fps) == (NUM_FRAMES, 64, 96, 12.0)
    # What was shown early is what the mp4 shows, up to the two files' rounding.
    film = read_clips(tmp_path / "made.mp4", [0], NUM_FRAMES, 64, 96)[0].frames
    for number in (0, 6, 16):
        wanted = film[:, number].permute(1, 2, 0).numpy()
        assert np.abs(pixels(frames[number]) - wanted).mean() < 6
    status, body = client.ask("GET", f"/api/clips/{name}")
    assert status == 200 and json.loads(body)["record"] == lines[-1]["record"]
    # A player asks for parts.
    assert client.ask("GET", lines[-1]["video"], range="bytes=0-9") == (206, content[:10])


def test_the_command_gives_the_same_clip(
    quick_client: Client, clip: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for path, settings in ((clip, {"seed": 7, "top_k": 50}), (image, {"temperature": "0"})):
        (tmp_path / path.name).write_bytes(path.read_bytes())
        record = quick_client.make(path, **settings)[-1]["record"]
        words = shlex.split(record["command"])
        assert words[:2] == ["python", "infer.py"]
        config = cli.parse(InferConfig, FLAGS, words[2:], "infer.py", "")
        batch.run(config)
        made = (tmp_path / "outputs" / config.video_save_name).with_suffix(".json")
        again = json.loads(made.read_text())
        assert again["tokens_sha256"] == record["tokens_sha256"]
        assert again["num_generated_tokens"] == record["num_generated_tokens"]


def png(width: int, height: int, blocks: int = 1) -> bytes:
    """A grey PNG of black pixels, small and quickly made."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    press = zlib.compressobj(9, zlib.DEFLATED, -15)
    rows = (width + 1) * height // blocks
    block = press.compress(bytes(rows)) + press.flush(zlib.Z_FULL_FLUSH)
    data = b"\x78\x9c" + block * blocks + b"\x03\x00" + struct.pack(">I", 1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def test_what_cannot_be_taken_is_refused_while_a_clip_is_generated(
    client: Client, image: Path, clip: Path, gate: threading.Event
) -> None:
    answers = [client.post(image.name, image.read_bytes(), seed=seed) for seed in range(2)]
    while b'"given"' not in answers[0].readline():
        pass
    bomb = png(20_000, 20_000, blocks=20)
    assert len(bomb) < 500_000  # of 400 MB
    refusals: list[tuple[str, bytes, dict[str, Any], int, str]] = [
        ("notes.txt", b"hello", {}, 422, "notes.txt is not an image or a clip by its name"),
        ("long.mp4", bytes(200_000_000), {}, 413, "has 200 MB, and at most 64 MB are let in"),
        ("wide.png", png(20_000, 2), {}, 422, "has 20,000x2 pixels"),
        ("bomb.png", bomb, {}, 422, "has 20,000x20,000 pixels, and at most 8,192 a side"),
        ("notes.mp4", b"hello, this is text" * 99, {}, 422, "notes.mp4 holds text, not video"),
        ("empty.mp4", b"", {}, 422, "empty.mp4 is empty"),
        ("notes.png", b"hello", {}, 422, "notes.png is not an image that can be read"),
        ("half.mp4", clip.read_bytes()[:-500], {}, 422, "half.mp4 is truncated"),
        ("bomb.mp4", bomb, {}, 422, "bomb.mp4 "),
        ("bar.png", image.read_bytes(), {"temperature": -1}, 422, "temperature"),
        ("bar.png", image.read_bytes(), {"top_p": 1.5}, 422, "top_p"),
        ("bar.png", image.read_bytes(), {"seed": "x", "tempo": 1}, 422, "'x' is not a whole"),
        ("bar.png", image.read_bytes(), {"num_input_frames": 9}, 422, "an image gives 1 frame"),
        ("bar.png", image.read_bytes(), {"prompt": "a ball"}, 422, "prompt"),
        ("bar.mp4", clip.read_bytes(), {"num_input_frames": 8}, 422, "8"),
        ("bar.mp4", clip.read_bytes(), {"num_input_frames": 17}, 422, "17"),
    ]
    for name, content, fields, status, problem in refusals:
        found = client.refusal(name, content, **fields)
        assert found[0] == status and problem in found[1], (name, found)
    assert client.count('cosmos_serve_refused_total{reason="file"}') == 8
    assert client.count("cosmos_serve_clips_running") == 1
    gate.set()
    for answer in answers:
        assert json.loads(answer.read().splitlines()[-1])["event"] == "done"
    assert client.count("cosmos_serve_clips_waiting") == 0


def test_an_upload_that_does_not_say_how_long_it_is_is_cut_off(quick_client: Client) -> None:
    connection = quick_client.connect()
    connection.putrequest("POST", "/api/clips")
    boundary = service.BOUNDARY
    connection.putheader("content-type", f"multipart/form-data; boundary={boundary}")
    connection.putheader("transfer-encoding", "chunked")
    connection.putheader("connection", "close")
    connection.endheaders()
    head = f'--{boundary}\r\ncontent-disposition: form-data; name="file"; filename="a.mp4"\r\n\r\n'
    for data in (head.encode(), *[bytes(1_000_000)] * 100):
        connection.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    connection.send(b"0\r\n\r\n")
    answer = connection.getresponse()
    assert answer.status == 413
    assert "at most 64 MB are let in" in json.loads(answer.read())["problem"]


def test_twenty_clients_at_once_are_served_in_order(quick_client: Client, clip: Path) -> None:
    start, ended = threading.Barrier(20), []

    def ask(number: int) -> tuple[list[dict[str, Any]], int]:
        start.wait()
        # Some of the same settings, which are generated together, and some of their own.
        lines = quick_client.make(clip, seed=number % 3)
        ended.append(lines[0]["number"])
        return lines, number % 3

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert all(lines[-1]["event"] == "done" for lines, _ in answers)
    assert quick_client.count('cosmos_serve_clips_total{state="done"}') == 20
    # In the order in which they were let in; those of one round end within moments.
    assert sorted(ended) == list(range(1, 21))
    assert max(abs(number - place) for place, number in enumerate(ended, 1)) <= 4
    for lines, _ in answers:
        ahead = [line["ahead"] for line in lines if line["event"] == "waiting"]
        assert ahead == sorted(ahead, reverse=True)
    tokens = {(seed, lines[-1]["record"]["tokens_sha256"]) for lines, seed in answers}
    assert len(tokens) == 3  # a seed gives one clip, in whatever company it was drawn


def test_a_full_queue_says_so_and_who_hangs_up_makes_room(
    tmp_path: Path, session: Session, image: Path, gate: threading.Event
) -> None:
    config = small_config(max_queue=2, max_batch_size=1)
    with running(config, tmp_path / "service", session) as client:
        first = client.post(image.name, image.read_bytes(), seed=0)
        while b'"given"' not in first.readline():
            pass
        waiting = [client.post(image.name, image.read_bytes(), seed=seed) for seed in (1, 2)]
        for answer in waiting:
            assert json.loads(answer.readline())["event"] == "accepted"
        status, problem = client.refusal(image.name, image.read_bytes(), seed=3)
        assert (status, problem) == (
            429,
            "the queue is full: 2 clips wait already; try again in a while.",
        )
        waiting[0].close()
        wait_until(lambda: client.count("cosmos_serve_clips_waiting") == 1, "a free place")
        last = client.post(image.name, image.read_bytes(), seed=4)
        gate.set()
        for answer in (first, waiting[1], last):
            assert json.loads(answer.read().splitlines()[-1])["event"] == "done"
        assert client.count('cosmos_serve_clips_total{state="done"}') == 3
        assert client.count('cosmos_serve_refused_total{reason="full"}') == 1
        assert client.count('cosmos_serve_clips_total{state="cancelled"}') == 1
        assert len(list((tmp_path / "service").iterdir())) == 3  # nothing is kept of that one


def test_a_clip_is_cancelled_while_it_is_generated(client: Client, image: Path) -> None:
    answer = client.post(image.name, image.read_bytes())
    name = json.loads(answer.readline())["name"]
    while b'"frames"' not in answer.readline():
        pass
    assert client.ask("DELETE", f"/api/clips/{name}")[0] == 204
    assert json.loads(answer.read().splitlines()[-1])["event"] == "cancelled"
    assert client.ask("GET", f"/api/clips/{name}/video.mp4")[0] == 404
    assert client.make(image)[-1]["event"] == "done"


def test_one_of_several_that_are_generated_together_is_cancelled(
    tmp_path: Path, session: Session, image: Path, gate: threading.Event
) -> None:
    with running(small_config(), tmp_path / "service", session) as client:
        # While the first is generated, alone, the others gather.
        answers = [client.post(image.name, image.read_bytes(), seed=0)]
        wait_until(lambda: client.count("cosmos_serve_clips_running") == 1, "the first")
        answers += [client.post(image.name, image.read_bytes(), seed=seed) for seed in (1, 2)]
        names = [json.loads(answer.readline())["name"] for answer in answers]
        gate.set()
        while b'"given"' not in answers[2].readline():
            pass
        assert client.ask("DELETE", f"/api/clips/{names[2]}")[0] == 204
        ends = [json.loads(answer.read().splitlines()[-1])["event"] for answer in answers]
        assert ends == ["done", "done", "cancelled"]
        assert client.count("cosmos_serve_rounds_total") == 2


def test_frames_that_cannot_be_shown_end_the_clip_and_not_the_service(
    tmp_path: Path, session: Session, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(small_config(), tmp_path / "service", session) as client:
        with monkeypatch.context() as patch:
            patch.setattr(session, "decode", lambda tokens: tokens[99])
            line = client.make(image)[-1]
        assert line["event"] == "failed" and "IndexError" in line["problem"]
        assert client.make(image)[-1]["event"] == "done"


def test_only_so_many_clips_are_kept(tmp_path: Path, quick: Session, clip: Path) -> None:
    with running(small_config(**QUICK, max_history=2), tmp_path / "service", quick) as client:
        made = [client.make(clip, seed=seed)[-1]["video"] for seed in range(4)]
        statuses = [client.ask("GET", video)[0] for video in made]
        assert statuses == [404, 200, 200, 200]  # the oldest go when the next one comes
        assert len(list((tmp_path / "service").iterdir())) == 3


def test_the_token_is_asked_for(tmp_path: Path, quick: Session, clip: Path) -> None:
    config = small_config(**QUICK, auth_token="a-secret-word")
    with running(config, tmp_path / "service", quick) as client:
        stranger = Client(client.port, {"authorization": "Bearer a-secret-wor"})
        for path in ("/api/info", "/metrics", "/api/clips/x"):
            status, body = stranger.ask("GET", path)
            assert status == 401 and "the token is missing or wrong" in json.loads(body)["problem"]
        assert stranger.refusal("a.mp4", bytes(10_000_000))[0] == 401
        assert stranger.ask("GET", "/healthz")[0] == stranger.ask("GET", "/")[0] == 200
        assert client.make(clip)[-1]["event"] == "done"
        assert Client(client.port).ask("GET", "/api/info")[0] == 401
        # A proxy may have any name where there is a token.
        assert client.ask("GET", "/api/info", host="clips.example")[0] == 200


def test_pages_of_other_sites_are_refused(quick_client: Client) -> None:
    own = f"127.0.0.1:{quick_client.port}"
    assert quick_client.ask("GET", "/api/info", origin=f"http://{own}")[0] == 200
    assert quick_client.ask("GET", "/api/info", host="localhost:9000")[0] == 200
    for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}):
        status, body = quick_client.ask("GET", "/api/info", **headers)
        assert status == 403 and "problem" in json.loads(body)


def test_what_comes_too_late_is_told_that_the_service_ends(
    tmp_path: Path, session: Session, image: Path
) -> None:
    with running(small_config(max_batch_size=1), tmp_path / "service", session) as client:
        running_one = client.post(image.name, image.read_bytes(), seed=0)
        while b'"given"' not in running_one.readline():
            pass
        waiting = client.post(image.name, image.read_bytes(), seed=1)
        assert b"accepted" in waiting.readline()
    for answer in (running_one, waiting):
        assert json.loads(answer.read().splitlines()[-1])["event"] == "cancelled"
