"""Exactly the frames that are needed, out of a video file, with PyAV.

Flows in: a path and a set of frame numbers (presentation order, as a player counts). Flows out:
those frames, in order, decoded from the keyframe before them and not further than the last one.

Two ways, the second is the meaning and the first its fast form:
  indexed     the packets' time stamps, read without decoding, say which packet is frame k; then
              seek to the keyframe before each run of wanted frames and decode only that run.
  sequential  decode from the start and count; for codecs and containers where packets and frames
              do not match one to one, and wherever the index turns out not to tell the truth.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cosmos_posttrain.errors import VideoError
from cosmos_posttrain.video.backend import VideoInfo
from cosmos_posttrain.video.streams import error_text, frame_rate, open_video, pixel_aspect

if TYPE_CHECKING:
    import av
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Codecs of which one packet is one shown frame (VP8, for one, has hidden frames).
_ONE_FRAME_PER_PACKET = frozenset(
    "h264 hevc av1 vp9 mpeg4 mpeg2video mpeg1video mjpeg prores dnxhd ffv1 png rawvideo".split()
)
# Frames leave the decoder at most 16 packets late (H.264, HEVC); the index reads this much further.
_REORDER_MARGIN = 64
# Below this distance, decoding on is cheaper than seeking.
_MIN_SKIP_PACKETS = 16


class _IndexMissError(Exception):
    """The packet index does not match what the decoder does; decode sequentially instead."""


@dataclass
class _PacketIndex:
    """Time stamps of a stream's packets, in the order in which they are stored (decode order)."""

    pts: list[int] = field(default_factory=list)
    dts: list[int] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)  # packet numbers of the keyframes
    shown: list[int] = field(default_factory=list)  # pts of frame 0, 1, 2, ...


def _index_packets(
    container: InputContainer, stream: VideoStream, last_frame: int
) -> _PacketIndex | None:
    """Reads packets (no decoding) until frame ``last_frame`` is certain; None without pts."""
    index = _PacketIndex()
    hidden = set()
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        if packet.pts is None:
            return None
        number = len(index.pts)
        if packet.is_keyframe:
            index.keys.append(number)
        if packet.is_discard:
            hidden.add(number)
        index.pts.append(packet.pts)
        index.dts.append(packet.pts if packet.dts is None else packet.dts)
        if number > last_frame + len(hidden) + _REORDER_MARGIN:
            break
    if not index.keys:
        return None
    first_key = index.keys[0]  # what comes before the first keyframe cannot be decoded
    shown = [
        pts
        for number, pts in enumerate(index.pts)
        if number >= first_key and pts >= index.pts[first_key] and number not in hidden
    ]
    index.shown = sorted(shown)
    if len(set(shown)) != len(shown):
        return None
    return index


@dataclass
class _Run:
    """Wanted frames that are decoded in one go, starting at a keyframe."""

    key: int
    frame_of_pts: dict[int, int]


def _plan_runs(index: _PacketIndex, wanted: Sequence[int]) -> list[_Run]:
    packet_of_pts = {pts: number for number, pts in enumerate(index.pts)}
    keys = sorted(index.keys, key=lambda number: index.pts[number])
    key_pts = [index.pts[number] for number in keys]
    runs: list[_Run] = []
    position = -_MIN_SKIP_PACKETS - 1
    for frame in wanted:
        pts = index.shown[frame]
        key = keys[max(bisect_right(key_pts, pts) - 1, 0)]
        if not runs or key > position + _MIN_SKIP_PACKETS:
            runs.append(_Run(key, {}))
        runs[-1].frame_of_pts[pts] = frame
        position = max(position, packet_of_pts[pts]) if runs[-1].frame_of_pts else position
    return runs


def _decode_run(
    container: InputContainer, stream: VideoStream, index: _PacketIndex, run: _Run
) -> Iterator[tuple[int, av.VideoFrame]]:
    key_pts, key_dts = index.pts[run.key], index.dts[run.key]
    container.seek(min(key_pts, key_dts), stream=stream, backward=True)
    left = dict(run.frame_of_pts)
    started = False
    for packet in container.demux(stream):
        if not started:
            # Some containers land a keyframe early; one that lands late cannot be used.
            if packet.size == 0 or packet.pts is None:
                raise _IndexMissError
            if not (packet.is_keyframe and packet.pts == key_pts):
                if packet.dts is not None and packet.dts > key_dts:
                    raise _IndexMissError
                continue
            started = True
        for frame in cast("list[av.VideoFrame]", packet.decode()):
            number = left.pop(frame.pts, None) if frame.pts is not None else None
            if number is not None:
                if frame.is_corrupt:
                    raise _IndexMissError
                yield number, frame
        if not left:
            return
    raise _IndexMissError


def _decode_sequential(
    path: Path, container: InputContainer, stream: VideoStream, wanted: Sequence[int]
) -> Iterator[tuple[int, av.VideoFrame]]:
    import av

    left = set(wanted)
    number = 0
    try:
        for frame in container.decode(stream):
            if number in left:
                if frame.is_corrupt:
                    raise VideoError(f"{path} is damaged at frame {number}.")
                left.discard(number)
                yield number, frame
            number += 1
            if not left:
                return
    except av.FFmpegError as error:
        raise VideoError(
            f"{path} cannot be decoded after frame {number}: {error_text(error)}."
        ) from error
    if number == 0:
        raise VideoError(f"{path} has no frame that can be decoded.")


def iter_frames(path: str | Path, wanted: Sequence[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """Yields (frame number, frame) of the wanted numbers, ascending; stops at the video's end.

    Args:
        path: the video.
        wanted: ascending frame numbers in presentation order; those past the end are left out.

    Raises:
        VideoError: the file cannot be opened, or a wanted frame cannot be decoded.
    """
    import av

    path = Path(path)
    done = -1
    with open_video(path) as (container, stream):
        try:
            index = None
            if wanted[-1] > 0 and stream.codec_context.name in _ONE_FRAME_PER_PACKET:
                index = _index_packets(container, stream, wanted[-1])
            if index is not None and index.shown:
                inside = [number for number in wanted if number < len(index.shown)]
                for run in _plan_runs(index, inside):
                    for done, frame in _decode_run(container, stream, index, run):
                        yield done, frame
                return
        except (_IndexMissError, av.FFmpegError):
            pass  # the sequential pass below decides whether the file is readable
    rest = [number for number in wanted if number > done]
    with open_video(path) as (container, stream):
        yield from _decode_sequential(path, container, stream, rest)


def _count_packets(path: Path) -> int:
    """Shown frames, counted by reading packets; by decoding where packets are not frames."""
    import av

    with open_video(path) as (container, stream):
        try:
            if stream.codec_context.name in _ONE_FRAME_PER_PACKET:
                return sum(1 for p in container.demux(stream) if p.size > 0 and not p.is_discard)
            return sum(1 for _ in container.decode(stream))
        except av.FFmpegError as error:
            raise VideoError(f"{path} cannot be read to its end: {error_text(error)}.") from error


def probe(path: str | Path) -> VideoInfo:
    """Size, rate and length of a video; decodes one frame, which proves that it can be decoded.

    The number of frames is the container's own where that is exact (mp4, mov), else counted from
    the packets.

    Raises:
        VideoError: the file cannot be opened or its first frame cannot be decoded.
    """
    from cosmos_posttrain.video.pixels import display_size

    path = Path(path)
    with open_video(path) as (container, stream):
        num_frames = stream.frames if "mov" in container.format.name else 0
        fps = frame_rate(stream)
        duration = float((stream.duration or 0) * (stream.time_base or 0))
        if not duration and container.duration:
            duration = container.duration / 1e6
        aspect = pixel_aspect(stream)
        _, first = next(_decode_sequential(path, container, stream, [0]), (0, None))
    if first is None:
        raise VideoError(f"{path} has no frame that can be decoded.")
    height, width = display_size(first, aspect)
    num_frames = num_frames or _count_packets(path)
    return VideoInfo(num_frames, fps, height, width, duration or (num_frames / fps if fps else 0.0))
