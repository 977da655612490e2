"""Decoding ahead: worker threads turn sources into clips while the tokenizer is busy.

Flows in: sources in order. Flows out: for each source, in the same order, its clips as they are
decoded, or the reason why it cannot be read. Decoding releases Python's lock, so threads suffice.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType

from cosmos_posttrain.errors import VideoError
from cosmos_posttrain.prepare.sources import VideoSource, clip_starts
from cosmos_posttrain.video import Clip, iter_clips, probe

_POLL_SECONDS = 0.2


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
    """
    starts = [0]
    if spec.clips_per_video != 1:
        span = (spec.num_frames - 1) * spec.stride + 1
        starts = clip_starts(probe(source.path).num_frames, span, spec.clips_per_video)
    yield from iter_clips(
        source.path, starts, spec.num_frames, spec.height, spec.width, spec.stride
    )


class _Closed(Exception):
    """The consumer has gone; stop decoding."""


class DecodingPool:
    """Decodes up to ``num_workers`` sources at once, each a few clips ahead of the consumer.

    Used as a context manager; iterate ``clips(0)``, ``clips(1)``, ... in order. What comes out does
    not depend on the number of workers.
    """

    def __init__(
        self, sources: Sequence[VideoSource], spec: ClipSpec, num_workers: int, clips_ahead: int
    ) -> None:
        self._sources = sources
        self._spec = spec
        self._clips_ahead = clips_ahead
        self._queues: dict[int, queue.Queue[Clip | Exception | None]] = {}
        self._lock = threading.Lock()
        self._next = 0
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

    def _queue_of(self, number: int) -> queue.Queue[Clip | Exception | None]:
        with self._lock:
            return self._queues.setdefault(number, queue.Queue(self._clips_ahead))

    def _put(self, number: int, item: Clip | Exception | None) -> None:
        target = self._queue_of(number)
        while not self._closed.is_set():
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
                end: Exception | None = None
                try:
                    for clip in read_source(self._sources[number], self._spec):
                        self._put(number, clip)
                except _Closed:
                    raise
                except Exception as error:  # whatever it is, it belongs to this one file
                    end = error
                self._put(number, end)
        except _Closed:
            return

    def clips(self, number: int) -> Iterator[Clip]:
        """Clips of source ``number``.

        Raises:
            VideoError: the source cannot be read (further).
        """
        source = self._queue_of(number)
        while (item := source.get()) is not None:
            if isinstance(item, VideoError):
                raise item
            if isinstance(item, Exception):
                path = self._sources[number].path
                raise VideoError(f"{path} cannot be read: {type(item).__name__}: {item}.") from item
            yield item
        with self._lock:
            del self._queues[number]
