"""A service with a tiny model in this process, and a client of it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cosmos_posttrain.inference.guardrail import Guardrail
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.serve import server
from cosmos_posttrain.serve.config import ServeConfig

BOUNDARY = "a-line-that-is-in-no-file"
PATIENCE_SECONDS = 60.0


def small_config(**changes: Any) -> ServeConfig:
    """Clips of 5 latent frames with 96 tokens each: long enough to look in between."""
    values: dict[str, Any] = {
        "ar_model_dir": "random:tiny",
        "encoder_path": "tiny-dv4x8x8",
        "num_context_frames": 17,
        "height": 64,
        "width": 96,
        "port": 0,
        "disable_guardrail": True,
    }
    return ServeConfig(**{**values, **changes})


@dataclass
class Client:
    """Talks to a service.

    Attributes:
        port: of 127.0.0.1.
        headers: that are sent with everything.
    """

    port: int
    headers: dict[str, str] = field(default_factory=dict)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_SECONDS)

    def ask(self, method: str, path: str, **headers: str) -> tuple[int, bytes]:
        """Status and body."""
        connection = self.connect()
        connection.request(method, path, headers={**self.headers, **headers})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer.status, body

    def post(self, name: str, content: bytes, **fields: Any) -> http.client.HTTPResponse:
        """Sends an upload; its answer can be read line by line, and closed."""
        parts = [
            f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
            for key, value in fields.items()
        ]
        parts.append(
            f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n'
            "content-type: application/octet-stream\r\n\r\n"
        )
        body = "".join(parts).encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()
        connection = self.connect()
        own = {
            "content-type": f"multipart/form-data; boundary={BOUNDARY}",
            "connection": "close",  # the answer then owns the socket
        }
        connection.request("POST", "/api/clips", body, {**self.headers, **own})
        return connection.getresponse()

    def make(self, path: Path, **fields: Any) -> list[dict[str, Any]]:
        """All lines of a clip."""
        answer = self.post(path.name, path.read_bytes(), **fields)
        assert answer.status == 200, answer.read()
        return [json.loads(line) for line in answer.read().splitlines()]

    def refusal(self, name: str, content: bytes, **fields: Any) -> tuple[int, str]:
        """Status and sentence of a clip that is refused."""
        answer = self.post(name, content, **fields)
        problem = json.loads(answer.read())["problem"]
        assert "\n" not in problem
        return answer.status, problem

    def count(self, name: str) -> float:
        """One of the metrics."""
        _, text = self.ask("GET", "/metrics")
        found = [line for line in text.decode().splitlines() if line.startswith(name)]
        assert len(found) == 1, text
        return float(found[0].rpartition(" ")[2])


@contextlib.contextmanager
def running(config: ServeConfig, folder: Path, session: Session | None = None) -> Iterator[Client]:
    """A service that answers; at the end it is stopped as a signal would, and has ended."""
    session = session or server.open_session(config)
    guardrail = Guardrail(config.guardrail_dir, config.disable_guardrail)
    folder.mkdir(exist_ok=True)
    bound = server.bind(config.host, config.port)
    port = bound.getsockname()[1]
    ends: list[Any] = []

    async def main() -> None:
        ends.append(asyncio.get_running_loop())
        notes = guardrail.notes
        await server.serve(config, session, guardrail, notes, bound, folder, ends.append)

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="service")
    thread.start()
    try:
        client = Client(port)
        wait_until(lambda: can_be_reached(client), "the service")
        if config.auth_token is not None:
            client.headers = {"authorization": f"Bearer {config.auth_token}"}
        yield client
    finally:
        loop, end = ends
        loop.call_soon_threadsafe(end)
        thread.join(60)
        assert not thread.is_alive(), "the service did not end"


def can_be_reached(client: Client) -> bool:
    try:
        return client.ask("GET", "/healthz")[0] == 200
    except OSError:
        return False


def wait_until(condition: Any, what: str, seconds: float = PATIENCE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} was not there in {seconds} s"
        time.sleep(0.02)
