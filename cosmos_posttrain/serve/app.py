"""The addresses of the service.

    GET    /                          the page, with /serve.css and /serve.js
    GET    /healthz                   200 while clips can be generated
    GET    /metrics                   counts, as Prometheus reads them
    GET    /api/info                  model, size of the clips, limits
    POST   /api/clips                 a form: ``file`` and settings; answers with lines of JSON, as
                                      things happen: waiting, given, frames, and at last done,
                                      failed or cancelled
    GET    /api/clips/NAME            what became of a clip
    DELETE /api/clips/NAME            it is not wanted any more
    GET    /api/clips/NAME/video.mp4  the clip

Whatever is refused is answered with a status of its own and {"problem": "one sentence"}.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send

from cosmos_posttrain.errors import ConfigError, UserError, VideoError
from cosmos_posttrain.geometry import num_pixel_frames
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.serve import uploads
from cosmos_posttrain.serve.config import ServeConfig
from cosmos_posttrain.serve.gate import Gate
from cosmos_posttrain.serve.metrics import Metrics
from cosmos_posttrain.serve.queue import ClipJob, JobQueue, QueueFullError
from cosmos_posttrain.serve.reading import Wanted
from cosmos_posttrain.serve.settings import ClipSettings
from cosmos_posttrain.serve.uploads import TooLargeError
from cosmos_posttrain.serve.worker import CLIP_FILE
from cosmos_posttrain.video import is_image

# Of an upload: text beside the file, and how long a client may take for all of it.
_FORM_BYTES = 256 * 1024
_UPLOAD_SECONDS = 300.0
_NUM_READERS = 2
_PAGE_FILES = {"/": "index.html", "/serve.css": "serve.css", "/serve.js": "serve.js"}
_MEDIA_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


class RefusedError(Exception):
    """A request that is answered with one sentence.

    Attributes:
        status: of the answer.
        problem: the sentence.
        reason: what it is counted as; see ``metrics.REFUSALS``.
    """

    def __init__(self, status: int, problem: str, reason: str) -> None:
        super().__init__(problem)
        self.status, self.problem, self.reason = status, problem, reason


@dataclass(eq=False)
class Desk:
    """What the addresses share.

    Attributes:
        config: of the service.
        session: asked what fits it; the worker's thread alone generates with it.
        queue: of those who wait.
        metrics: counts.
        folder: each clip has one of its own in it.
        notes: sentences for the page.
        is_well: whether clips can be generated.
        jobs: by name, the oldest first.
    """

    config: ServeConfig
    session: Session
    queue: JobQueue
    metrics: Metrics
    folder: Path
    notes: tuple[str, ...] = ()
    is_well: Callable[[], bool] = lambda: True
    jobs: dict[str, ClipJob] = field(default_factory=dict)
    readers: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_NUM_READERS))

    def info(self) -> dict[str, Any]:
        """What the page must know."""
        config, clip = self.config, self.session.geometry
        compression = clip.compression
        return {
            "model": self.session.name,
            "num_frames": clip.num_frames,
            "width": clip.width,
            "height": clip.height,
            "latents": clip.latent_shape.time,
            "frames_given": [
                num_pixel_frames(count, compression) for count in range(1, clip.latent_shape.time)
            ],
            "is_video2world": self.session.model_config.is_video2world,
            "max_upload_mb": config.max_upload_mb,
            "notes": self.notes,
        }

    def forget_old(self) -> None:
        """Removes the oldest clips beyond those that are kept."""
        ended = [job for job in self.jobs.values() if job.summary]
        for job in ended[: max(len(ended) - self.config.max_history, 0)]:
            del self.jobs[job.name]
            shutil.rmtree(job.folder, ignore_errors=True)


def make_app(desk: Desk) -> Gate:
    """The service as an ASGI application, behind its gate."""
    app = FastAPI(title="cosmos_posttrain", docs_url=None, redoc_url=None, openapi_url=None)
    _add_page(app)
    _add_state(app, desk)
    _add_clips(app, desk)

    async def refuse(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return JSONResponse({"problem": str(error.detail)}, error.status_code)

    app.add_exception_handler(HTTPException, refuse)
    return Gate(app, desk.config)


def _add_page(app: FastAPI) -> None:
    folder = resources.files(__package__ or "").joinpath("page")
    for address, name in _PAGE_FILES.items():
        content = folder.joinpath(name).read_bytes()
        media_type = f"{_MEDIA_TYPES[name.rpartition('.')[2]]}; charset=utf-8"
        app.add_api_route(address, _constant(content, media_type), methods=["GET", "HEAD"])


def _constant(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def answer() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    return answer


def _add_state(app: FastAPI, desk: Desk) -> None:
    @app.get("/healthz")
    async def healthz() -> Response:
        is_well = desk.is_well()
        return JSONResponse({"status": "ok" if is_well else "ending"}, 200 if is_well else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = desk.metrics.text(*desk.queue.counts)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/api/info")
    async def info() -> Response:
        return JSONResponse(desk.info())


def _add_clips(app: FastAPI, desk: Desk) -> None:
    def find(name: str) -> ClipJob:
        job = desk.jobs.get(name)
        if job is None:
            raise HTTPException(404, "there is no such clip (any more).")
        return job

    @app.post("/api/clips")
    async def make(request: Request) -> Response:
        max_bytes = desk.config.max_upload_mb * 10**6 + _FORM_BYTES
        body = uploads.Body(request.receive, max_bytes)
        try:
            desk.queue.take_place()
        except QueueFullError as error:
            desk.metrics.count_refused("full")
            await body.drain()
            return JSONResponse({"problem": str(error)}, 429, headers={"retry-after": "30"})
        is_used = False
        try:
            job = await _take_in(desk, Request(request.scope, body))
            is_used = True
        except RefusedError as error:
            desk.metrics.count_refused(error.reason)
            await body.drain()
            return JSONResponse({"problem": error.problem}, error.status)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it
        finally:
            if not is_used:
                desk.queue.give_back()
        desk.jobs[job.name] = job
        desk.queue.put(job)
        desk.forget_old()
        return ClipLines(job, desk.queue)

    @app.get("/api/clips/{name}")
    async def look(name: str) -> Response:
        job = find(name)
        return JSONResponse(job.summary or {"state": job.state})

    @app.delete("/api/clips/{name}")
    async def cancel(name: str) -> Response:
        desk.queue.cancel(find(name), also_running=True)
        return Response(status_code=204)

    @app.get("/api/clips/{name}/video.mp4")
    async def video(name: str) -> Response:
        job = find(name)
        if job.state != "done":
            raise HTTPException(404, "the clip is not there yet.")
        return FileResponse(job.folder / CLIP_FILE, media_type="video/mp4")


async def _take_in(desk: Desk, request: Request) -> ClipJob:
    """Takes an upload in and has it decoded.

    Raises:
        RefusedError: with a sentence for the client.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > desk.config.max_upload_mb * 10**6 + _FORM_BYTES:
        raise _too_large(desk, f"has {int(announced) / 1e6:,.0f} MB")
    folder = desk.folder / secrets.token_urlsafe(16)
    try:
        async with (
            asyncio.timeout(_UPLOAD_SECONDS),
            request.form(max_files=1, max_fields=20, max_part_size=64 * 1024) as fields,
        ):
            values = dict(fields)
            file = values.pop("file", None)
            if not isinstance(file, UploadFile):
                raise RefusedError(422, "there is no file; send an image or a clip.", "file")
            settings, wanted = _wanted(desk, file.filename, values)
            await asyncio.to_thread(uploads.save, file.file, folder / wanted.name)
        async with desk.readers:
            found = await uploads.read(folder, wanted)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, TooLargeError):
            raise _too_large(desk, "is larger") from error
        if isinstance(error, TimeoutError):
            problem = f"the upload took longer than {_UPLOAD_SECONDS:.0f} s; send a smaller file."
            raise RefusedError(408, problem, "size") from error
        if isinstance(error, UserError):
            reason = "file" if isinstance(error, VideoError) else "settings"
            raise RefusedError(422, str(error), reason) from error
        raise
    loop = asyncio.get_running_loop()
    return ClipJob(folder.name, wanted.name, folder, settings, found, loop)


def _too_large(desk: Desk, what: str) -> RefusedError:
    limit = desk.config.max_upload_mb
    problem = f"the upload {what}, and at most {limit:,} MB are let in; send a smaller file."
    return RefusedError(413, problem, "size")


def _wanted(
    desk: Desk, filename: str | None, fields: dict[str, Any]
) -> tuple[ClipSettings, Wanted]:
    """Everything that can be refused before the file is looked into.

    Raises:
        UserError: names what is wrong.
    """
    config, clip = desk.config, desk.session.geometry
    name = uploads.safe_name(filename)
    settings = ClipSettings.from_form(fields)
    if is_image(name) and settings.num_input_frames not in (None, 1):
        raise ConfigError(f"an image gives 1 frame, not {settings.num_input_frames}.")
    count = 1 if is_image(name) else settings.frames_given(clip)
    blank = torch.empty(3, count, clip.height, clip.width, dtype=torch.uint8)
    desk.session.check(settings.request(blank, 0.0))
    wanted = Wanted(
        *(name, count, clip.height, clip.width),
        *(config.max_upload_side, config.max_upload_seconds),
    )
    return settings, wanted


class ClipLines(Response):
    """What happens to a job, line by line; who hangs up while it waits is not waited for."""

    media_type = "application/x-ndjson"

    def __init__(self, job: ClipJob, queue: JobQueue) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._job, self._queue = job, queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the lines until the last one."""
        gone = asyncio.ensure_future(_hang_up(receive))
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await send(head)
            while True:
                line = asyncio.ensure_future(self._job.lines.get())
                await asyncio.wait({line, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not line.done():
                    line.cancel()
                    return
                if (text := line.result()) is None:
                    break
                await send({"type": "http.response.body", "body": text, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            gone.cancel()
            self._queue.cancel(self._job)


async def _hang_up(receive: Receive) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass
