"""The one thread that generates: it owns the session, from the first clip to the last.

Flows in: jobs from the queue. Flows out, to each client: the given frames and those that follow as
JPEG, latent frame by latent frame, then where its mp4 is; in the job's folder ``CLIP_FILE`` and
``RECORD_FILE``.
"""

from __future__ import annotations

import base64
import io
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cosmos_posttrain import files, launch
from cosmos_posttrain.errors import CosmosPosttrainError
from cosmos_posttrain.inference.guardrail import Guardrail
from cosmos_posttrain.inference.request import GeneratedClip, Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.serve import following
from cosmos_posttrain.serve.command import ClipCommand
from cosmos_posttrain.serve.following import IDLE_SECONDS, NotWantedError, Round
from cosmos_posttrain.serve.metrics import Metrics
from cosmos_posttrain.serve.queue import ClipJob, JobQueue
from cosmos_posttrain.serve.reading import FRAMES_FILE
from cosmos_posttrain.video import write_mp4

CLIP_FILE, RECORD_FILE = "clip.mp4", "clip.json"
_JPEG_QUALITY = 85


class Worker(threading.Thread):
    """Generates what is in the queue, in order, until it is closed.

    Args:
        session: opened and loaded; nobody else uses it meanwhile.
        queue: where jobs come from.
        guardrail: of prompts and frames.
        command: what repeats a clip.
        metrics: counts what is done.
        shows_frames: whether frames are decoded while more are generated.
        max_jobs: that are generated together.
        on_end: called when the thread ends, whyever.

    Attributes:
        failure: what ended the thread before the queue was closed; None otherwise.
    """

    def __init__(
        self,
        session: Session,
        queue: JobQueue,
        guardrail: Guardrail,
        command: ClipCommand,
        metrics: Metrics,
        shows_frames: bool,
        max_jobs: int,
        on_end: Callable[[], None],
    ) -> None:
        super().__init__(name="generation", daemon=True)
        self._session, self._queue, self._guardrail = session, queue, guardrail
        self._command, self._metrics = command, metrics
        self._shows_frames, self._max_jobs, self._on_end = shows_frames, max_jobs, on_end
        self.failure: BaseException | None = None

    def run(self) -> None:
        """The thread."""
        try:
            while (jobs := self._queue.take(self._max_jobs, IDLE_SECONDS)) is not None:
                self._do(jobs)
            following.agree(Round(is_last=True))
        except BaseException as error:  # the thread's last words
            self.failure = error
            traceback.print_exception(error)
        finally:
            self._on_end()

    def _do(self, jobs: Sequence[ClipJob]) -> None:
        """One round; whatever happens, each of its jobs gets an end."""
        wanted = [(job, request) for job in jobs if (request := self._request(job)) is not None]
        if not wanted:
            following.agree(Round())
            return
        doing = [job for job, _ in wanted]
        try:
            self._generate(doing, [request for _, request in wanted])
        except NotWantedError:
            self._end(doing, "cancelled", "it was cancelled.")
        except CosmosPosttrainError as error:
            self._end(doing, "failed", str(error))
        except Exception as error:
            self._end(doing, "failed", _unexpected(error))
            if launch.world_size() > 1:
                raise  # the other ranks are in the middle of it
        finally:
            self._end(doing, "failed", "the service failed.")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _end(self, jobs: Sequence[ClipJob], state: str, problem: str) -> None:
        for job in jobs:
            if job.state == "running":
                self._metrics.count_job(state)
                job.end(state, problem=problem)

    def _request(self, job: ClipJob) -> Request | None:
        """What to generate; None where the guardrail or the session refuses."""
        try:
            frames = torch.from_numpy(np.load(job.folder / FRAMES_FILE))
            (job.folder / FRAMES_FILE).unlink()
            for text in filter(None, (job.settings.prompt, job.settings.negative_prompt)):
                self._guardrail.check_prompt(text)
            request = job.settings.request(frames, job.found.fps)
            self._session.check(request)
            job.say("given", frames=_jpegs(self._guardrail.blur_faces(frames)))
            return request
        except CosmosPosttrainError as error:
            self._end([job], "failed", str(error))
            return None
        except Exception as error:
            self._end([job], "failed", _unexpected(error))
            return None

    def _generate(self, jobs: Sequence[ClipJob], requests: Sequence[Request]) -> None:
        """Generates a clip for each job, and tells each how far it is."""
        num_shown = [0] * len(jobs)
        failures: list[Exception] = []

        def show(number: int, tokens: Tensor) -> None:
            if jobs[number].wants_end:
                self._end([jobs[number]], "cancelled", "it was cancelled.")
                return
            try:
                num_shown[number] = self._show(jobs[number], tokens, num_shown[number])
            except Exception as error:  # all ranks must hear of it, and they are elsewhere
                failures.append(error)

        def is_wanted() -> bool:
            return not failures and not all(job.wants_end for job in jobs)

        following.agree(Round(requests))
        start = time.monotonic()
        try:
            clips = following.generate(self._session, requests, is_wanted, show)
        finally:
            if failures:
                raise failures[0]
        num_tokens = sum(clip.num_generated_tokens for clip in clips)
        self._metrics.count_round(num_tokens, time.monotonic() - start)
        for job, clip in zip(jobs, clips, strict=True):
            if job.state == "running":
                self._finish(job, clip)

    def _show(self, job: ClipJob, tokens: Tensor, first: int) -> int:
        """Sends the frames of a clip that follow the first so many; returns how many are known."""
        grid = self._session.geometry.latent_shape[1:]
        latents = len(tokens) // (grid[0] * grid[1])
        if not self._shows_frames:
            job.say("frames", latents=latents, first=0, frames=[])
            return 0
        whole = tokens[: latents * grid[0] * grid[1]]
        decoded = self._session.decode(whole.view(latents, *grid))
        new = self._guardrail.blur_faces(decoded[:, first:])
        job.say("frames", latents=latents, first=first, frames=_jpegs(new))
        return decoded.shape[1]

    def _finish(self, job: ClipJob, clip: GeneratedClip) -> None:
        """Writes what is kept of a clip."""
        frames = self._guardrail.blur_faces(clip.frames)
        write_mp4(job.folder / CLIP_FILE, frames, clip.fps)
        record = {**clip.record, "command": self._command.line(job.file, job.settings)}
        try:
            files.write_json(job.folder / RECORD_FILE, record)
        except OSError as error:
            raise CosmosPosttrainError(f"the clip cannot be kept: {error.strerror}.") from error
        self._metrics.count_job("done")
        job.end(
            "done",
            video=f"/api/clips/{job.name}/video.mp4",
            record=record,
            num_repeated=job.found.num_repeated,
        )


def _unexpected(error: Exception) -> str:
    """The sentence for a client; all about it goes to the log."""
    traceback.print_exception(error)
    return f"the service failed ({type(error).__name__}); see its log."


def _jpegs(frames: Tensor) -> list[str]:
    """(3, T, H, W) uint8 -> base64 of a JPEG each."""
    return [_jpeg(frame.permute(1, 2, 0).numpy()) for frame in frames.unbind(1)]


def _jpeg(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "JPEG", quality=_JPEG_QUALITY)
    return base64.b64encode(file.getvalue()).decode()
