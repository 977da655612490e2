"""A small Hugging Face hub on this machine: repositories of a few files, for real clients.

Flows in: files by repository. Flows out: an address for ``HF_ENDPOINT``, and a list of the requests
that came in. It can be told to gate a repository, to break off a transfer, or to damage one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_may_read_everything"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds and does."""

    repositories: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    # Files of which only the first half is sent, once each; and files with one wrong byte.
    cut: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    endpoint: str = ""

    def environment(self, home: Any) -> dict[str, str]:
        """For a process that is to use this hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.split("/")
        name = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        rest = parts[4:] if parts[0] == "api" else parts[2:]
        if name not in self.hub.repositories:
            return self._fail(404, "RepoNotFound")
        token = self.headers.get("Authorization", "")
        if name in self.hub.gated and parts[0] != "api" and token != f"Bearer {TOKEN}":
            return self._fail(403, "GatedRepo")
        if len(rest) > 1 and rest[1] not in ("main", "v1", COMMIT):
            return self._fail(404, "RevisionNotFound")
        files = self.hub.repositories[name]
        if parts[0] != "api":
            return self._file(name, "/".join(rest[2:]), files)
        if rest[:1] == ["tree"]:
            return self._json([_tree_entry(file, data) for file, data in files.items()])
        siblings = [_sibling(file, data) for file, data in files.items()]
        return self._json({"id": name, "modelId": name, "sha": COMMIT, "siblings": siblings})

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _file(self, name: str, file: str, files: dict[str, bytes]) -> None:
        if file not in files:
            return self._fail(404, "EntryNotFound")
        data, start = files[file], 0
        wanted = self.headers.get("Range")
        if wanted:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        key = f"{name}/{file}"
        if key in self.hub.cut:
            self.wfile.write(data[start : (start + len(data)) // 2])
            self.close_connection = True
            return
        if key in self.hub.damaged:
            data = bytes([data[0] ^ 1]) + data[1:]
        self.wfile.write(data[start:])


def _is_large(data: bytes) -> bool:
    return len(data) > 1000


def _git_sum(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _sibling(file: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": _git_sum(data)}
    if _is_large(data):
        sums = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"sha256": sums, "size": len(data), "pointerSize": 130}
    return entry


def _tree_entry(file: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": file,
        "size": len(data),
        "oid": _git_sum(data),
    }
    if _is_large(data):
        sums = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": sums, "size": len(data), "pointerSize": 130}
    return entry


@contextlib.contextmanager
def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """Runs a hub on a free port while the context is open."""
    hub = Hub(repositories)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
