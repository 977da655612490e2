"""What clients send: how much of it is taken in, and who decodes it.

Flows in: a request's body; later, a file. Flows out: a form whose size was counted as it came, and
the frames that a limited process made of the file (``reading``), or one sentence for the client.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

from starlette.types import Message, Receive

from cosmos_posttrain.errors import VideoError
from cosmos_posttrain.serve import reading
from cosmos_posttrain.serve.reading import Found, Wanted
from cosmos_posttrain.video import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from cosmos_posttrain.video.choice import VARIABLE

_READ_SECONDS = 60.0
# What is left of a refused upload is thrown away for so long, so that its sender gets the answer.
_DRAIN_SECONDS = 30.0
_MAX_NAME_BYTES = 100
# Of the environment: no tokens, no proxies.
_KEPT_VARIABLES = (
    *("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "HOME"),
    VARIABLE,
)


class TooLargeError(Exception):
    """A body has more bytes than are let in."""


class Body:
    """A request's body, counted as it comes; takes the place of ASGI's ``receive``.

    Args:
        receive: ASGI's own.
        max_bytes: it may have; more of them raise ``TooLargeError``.
    """

    def __init__(self, receive: Receive, max_bytes: int = sys.maxsize) -> None:
        self._receive, self._max_bytes = receive, max_bytes
        self._num_bytes, self._is_over = 0, False

    async def __call__(self) -> Message:
        """The next part."""
        message = await self._next()
        if self._num_bytes > self._max_bytes:
            raise TooLargeError
        return message

    async def drain(self) -> None:
        """Throws away what is left; a sender reads no answer before it has sent all."""
        end = time.monotonic() + _DRAIN_SECONDS
        with contextlib.suppress(TimeoutError):
            while not self._is_over and (left := end - time.monotonic()) > 0:
                await asyncio.wait_for(self._next(), left)

    async def _next(self) -> Message:
        message = await self._receive()
        self._num_bytes += len(message.get("body", b""))
        self._is_over = not message.get("more_body", False)
        return message


def safe_name(name: str | None) -> str:
    """A file name of a client as one that harms nobody.

    Raises:
        VideoError: it is none of an image or a clip.
    """
    bare = (name or "").replace("\\", "/").rpartition("/")[2]
    clean = re.sub(r"[^\w.() -]", "_", bare).lstrip(".- ") or "upload"
    stem, suffix = os.path.splitext(clean)
    if suffix.lower() not in IMAGE_EXTENSIONS | VIDEO_EXTENSIONS:
        known = " ".join(sorted(IMAGE_EXTENSIONS | VIDEO_EXTENSIONS))
        raise VideoError(f"{clean} is not an image or a clip by its name; known are {known}.")
    return stem.encode()[:_MAX_NAME_BYTES].decode(errors="ignore") + suffix


def save(source: BinaryIO, target: Path) -> None:
    """Writes an upload into its folder."""
    target.parent.mkdir()
    source.seek(0)
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, 2**20)


async def read(folder: Path, wanted: Wanted) -> Found:
    """Decodes a file of a folder in a process of its own; the file is gone afterwards.

    Raises:
        VideoError: it is refused, or the process went beyond its limits.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "ignore", "-m", reading.__name__, json.dumps(asdict(wanted))),
        cwd=folder,
        env=_environment(),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), _READ_SECONDS)
        answer = json.loads(said)
    except (TimeoutError, ValueError) as error:
        raise VideoError(
            f"{wanted.name} cannot be decoded with {wanted.memory_bytes // 2**20:,} MiB of memory "
            f"in {wanted.cpu_seconds} s; send a smaller one."
        ) from error
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        (folder / wanted.name).unlink(missing_ok=True)
    if "problem" in answer:
        raise VideoError(answer["problem"])
    return Found(**answer)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [kept.get("PYTHONPATH")])]
    # Each thread of OpenBLAS takes address space, of which there is little.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return {**kept, **threads, "PYTHONPATH": os.pathsep.join(paths)}
