"""Decoding ahead: worker threads turn sources into clips while the tokenizer is busy.

Flows in: sources in order. Flows out: for each source, in the same order, its clips as they are
decoded, or the reason why it cannot be read. Decoding releases Python's lock, so threads suffice.
"""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from cosmos_posttrain.errors import CosmosPosttrainError, VideoError
from cosmos_posttrain.prepare.sources import VideoSource, clip_starts
from cosmos_posttrain.video import Clip, iter_clips, probe

_POLL_SECONDS = 0.2
# The machine's fault, not the video's: another time the same video may well be read.
_PASSING = {errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
_PASSING |= {errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}


@dataclass(frozen=True)
class ClipSpec:
    """What to cut out of each video: size in frames and pixels, distance of frames, how many."""

    num_frames: int
    height: int
    width: int
    stride: int
    clips_per_video: int | None


def read_source(source: VideoSource, spec: ClipSpec) -> Iterator[Clip]:
    """Decodes one source's clips.

    Raises:
        VideoError: it cannot be read.
        CosmosPosttrainError: the machine is at fault, or what decodes here; nothing is known about
            the source.
    """
    starts = [0]
    _check_text(source)
    try:
        if spec.clips_per_video != 1:
            span = (spec.num_frames - 1) * spec.stride + 1
            starts = clip_starts(probe(source.path).num_frames, span, spec.clips_per_video)
        yield from iter_clips(
            source.path, starts, spec.num_frames, spec.height, spec.width, spec.stride
        )
    except Exception as error:
        cause = _passing_cause(error)
        if cause is not None:
            raise CosmosPosttrainError(
                f"{source.path} could not be read now ({cause.strerror}), which says nothing about "
                "the video; finished shards stay, so mend that and give the same command again."
            ) from error
        if isinstance(error, CosmosPosttrainError):
            raise
        # Whatever else it is, it belongs to this one file.
        raise VideoError(
            f"{source.path} cannot be read: {type(error).__name__}: {error}."
        ) from error


def _check_text(source: VideoSource) -> None:
    """Refuses what no file of ours could hold."""
    try:
        f"{source.name} {source.prompt}".encode()
    except UnicodeEncodeError as error:
        raise VideoError(f"{source.path} has a name or a prompt that is not UTF-8.") from error


def _passing_cause(error: BaseException) -> OSError | None:
    """What an error comes from where that has nothing to do with the video."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _PASSING:
            return cause
        cause = cause.__cause__
    return None


class _Closed(Exception):
    """The consumer has gone; stop decoding."""


class _Left(Exception):
    """The consumer wants no more of this source; go on with the next."""


class DecodingPool:
    """Decodes up to ``num_workers`` sources at once, each a few clips ahead of the consumer.

    Used as a context manager; call ``read`` for the sources in order. What comes out does not
    depend on the number of workers.
    """

    def __init__(
        self, sources: Sequence[VideoSource], spec: ClipSpec, num_workers: int, clips_ahead: int
    ) -> None:
        self._sources = sources
        self._spec = spec
        self._clips_ahead = clips_ahead
        self._queues: dict[int, queue.Queue[Clip | BaseException | None]] = {}
        self._lock = threading.Lock()
        self._next = self._next_read = 0
        self._left: set[int] = set()
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"decode-{number}", daemon=True)
            for number in range(min(num_workers, max(len(sources), 1)))
        ]

    def __enter__(self) -> DecodingPool:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def _queue_of(self, number: int) -> queue.Queue[Clip | BaseException | None]:
        with self._lock:
            return self._queues.setdefault(number, queue.Queue(self._clips_ahead))

    def _put(self, number: int, item: Clip | BaseException | None) -> None:
        target = self._queue_of(number)
        while not self._closed.is_set():
            if number in self._left:
                raise _Left
            try:
                return target.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
        raise _Closed

    def _work(self) -> None:
        # Sources are taken in order, so the one that the consumer waits for is always in work.
        try:
            while True:
                with self._lock:
                    number, self._next = self._next, self._next + 1
                if number >= len(self._sources):
                    return
                self._decode(number)
        except _Closed:
            return

    def _decode(self, number: int) -> None:
        end: BaseException | None = None
        try:
            try:
                for clip in read_source(self._sources[number], self._spec):
                    self._put(number, clip)
            except (_Closed, _Left):
                raise
            except BaseException as error:  # the consumer raises it: nothing ends a thread unseen
                end = error
            self._put(number, end)
        except _Left:
            self._leave(number)

    def read(self, source: VideoSource) -> Iterator[Clip]:
        """Clips of one of the next sources; those before it are left out.

        Raises:
            VideoError: the source cannot be read (further).
            CosmosPosttrainError: the machine is at fault.
        """
        while self._sources[self._next_read] is not source:
            self._leave(self._next_read)
            self._next_read += 1
        number, self._next_read = self._next_read, self._next_read + 1
        clips = self._queue_of(number)
        item: Clip | BaseException | None = None
        try:
            while isinstance(item := clips.get(), Clip):
                yield item
        finally:
            self._leave(number)
        if item is not None:
            raise item

    def _leave(self, number: int) -> None:
        """No more of a source is wanted; its decoder notices when it has the next clip."""
        with self._lock:
            self._left.add(number)
            self._queues.pop(number, None)
