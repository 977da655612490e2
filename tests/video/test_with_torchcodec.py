"""torchcodec behind the same reader: the same frames in number, and near in colour.

What needs no torchcodec runs everywhere; the rest is skipped where it cannot be loaded.
"""

from __future__ import annotations

import functools
import importlib.util
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.reference import SAMPLES_DIR, needs_samples
from helpers.video_files import (
    B_FRAMES,
    BASE,
    FORMATS,
    ROTATE_90,
    STEP,
    grey_frames,
    set_display_matrix,
    write_audio,
    write_video,
)
from PIL import Image

from cosmos_posttrain.errors import UserError, VideoError
from cosmos_posttrain.video import (
    check_writing,
    choice,
    probe,
    read_clips,
    read_image,
    with_pyav,
    write_mp4,
)
from cosmos_posttrain.video.backend import Fit
from cosmos_posttrain.video.with_torchcodec import _shown_size, error_text, fitted

# FFmpeg's default conversion rounds downwards, by a level and more in 10 bits: means are nearer to
# the right level once this is added.
_BIAS = 1.0


@functools.cache
def why_not() -> str:
    """Why torchcodec cannot be tested here; empty where it can."""
    if importlib.util.find_spec("torchcodec") is None:
        return "torchcodec is not installed"
    try:
        choice.loaded("torchcodec")
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture
def with_torchcodec(monkeypatch: pytest.MonkeyPatch) -> None:
    if why_not():
        pytest.skip(why_not())
    monkeypatch.setenv(choice.VARIABLE, "torchcodec")


def numbers(frames: torch.Tensor) -> list[int]:
    levels = frames.float().mean(dim=(0, 2, 3))
    return [round((float(level) + _BIAS - BASE) / STEP) for level in levels]


def picture(height: int, width: int) -> np.ndarray:
    """Smooth waves and a few edges."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 100 * np.sin(x / 9 + c) * np.cos(y / (5 + c)) for c in range(3)]
    image = np.stack(waves, -1).astype(np.uint8)
    image[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 90)
    return image


@pytest.mark.parametrize("size", [(96, 160), (48, 48), (37, 91), (270, 480), (300, 500)])
def test_scaling_is_the_readers_own_but_for_the_kernel(size):
    """Of RGB there is nothing to convert, so what differs is the bicubic kernel (0.5 and 0.6)."""
    import av

    image = picture(270, 480)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    expected = with_pyav.FrameFitter(*size)(frame).astype(int)
    found = fitted(torch.from_numpy(image), (270, 480), Fit(*size))
    assert found.shape == (*size, 3) and found.dtype == np.uint8 and found.flags["C_CONTIGUOUS"]
    difference = np.abs(found.astype(int) - expected)
    assert difference.mean() < 0.6 and difference.max() <= 16  # at the edges


def test_a_clip_owns_its_pixels():
    """A decoder may use a frame's memory again."""
    frame = torch.zeros(16, 16, 3, dtype=torch.uint8)
    pixels = fitted(frame, (16, 16), Fit(16, 16))
    frame.fill_(9)
    assert pixels.max() == 0


def test_pixel_aspect_is_that_of_the_stored_picture():
    upright = torch.zeros(48, 64, 3, dtype=torch.uint8)
    for aspect, rotation, shown in [
        (Fraction(2, 1), None, (48, 128)),
        (Fraction(2, 1), 90.0, (96, 64)),
        (Fraction(0, 1), 180.0, (48, 64)),
        (None, None, (48, 64)),
    ]:
        metadata = SimpleNamespace(pixel_aspect_ratio=aspect, rotation=rotation)
        assert _shown_size(upright, metadata) == shown


def test_what_it_says_fits_into_a_sentence():
    where = "SingleStreamDecoder, /build/src/_core/SingleStreamDecoder.cpp:52, "
    text = "Could not open input file: /a, b.mp4 Invalid data found when processing input"
    assert error_text(RuntimeError(where + text)) == "invalid data found when processing input"
    assert error_text(RuntimeError(where + "No valid stream found.\nmore")) == (
        "no valid stream found"
    )
    assert error_text(AssertionError()) == "assertionerror"


@pytest.mark.usefixtures("with_torchcodec")
@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options"), FORMATS, ids=lambda v: str(v)[:24]
)
def test_every_frame_is_the_right_one_for_torchcodec_too(tmp_path, name, codec, pix_fmt, options):
    fps = 25 if codec == "mpeg2video" else 10
    path = write_video(tmp_path / name, grey_frames(50), codec, pix_fmt, fps, options)
    clips = read_clips(path, [31, 0, 13, 47], 5, 24, 32)
    assert [numbers(clip.frames) for clip in clips] == [
        [31, 32, 33, 34, 35],
        [0, 1, 2, 3, 4],
        [13, 14, 15, 16, 17],
        [47, 48, 49, 49, 49],
    ]
    assert [clip.num_repeated for clip in clips] == [0, 0, 0, 2]
    info = probe(path)
    assert (info.num_frames, info.fps, info.height, info.width) == (50, fps, 48, 64)


@pytest.mark.usefixtures("with_torchcodec")
def test_torchcodec_turns_stretches_and_counts_as_pyav_does(tmp_path):
    gaps = [int(value) for value in np.cumsum([5, 10, 500, 20, 33, 900, 15, 40, 40, 7] * 3)]
    odd = [picture(50, 66)] * 3  # what 4:2:0 still holds; the clip's size is odd
    paths = [
        write_video(tmp_path / "vfr.mp4", grey_frames(30), options=B_FRAMES, pts=gaps),
        set_display_matrix(write_video(tmp_path / "phone.mp4", odd), ROTATE_90),
        write_video(tmp_path / "dv.mp4", odd, sample_aspect_ratio=Fraction(2, 1)),
    ]
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera on its side
    Image.fromarray(picture(48, 64)).save(tmp_path / "photo.jpg", exif=exif, quality=95)
    for path in [*paths, tmp_path / "photo.jpg"]:
        ours, theirs = probe(path), with_pyav.probe(path)
        assert (ours.num_frames, ours.height, ours.width) == (
            theirs.num_frames,
            theirs.height,
            theirs.width,
        )
        wanted, fit = range(0, ours.num_frames, 2), Fit(35, 47)
        expected = list(with_pyav.iter_pixels(path, wanted, fit))
        found = list(choice.chosen().iter_pixels(path, wanted, fit))
        assert [number for number, _ in found] == [number for number, _ in expected]
        for (_, pixels), (_, right) in zip(found, expected, strict=True):
            assert np.abs(pixels.astype(int) - right.astype(int)).mean() < 4
    png = tmp_path / "still%d.png"  # a pattern to FFmpeg, a file to us
    Image.fromarray(picture(48, 64)).save(png)
    image = read_image(png, 48, 64)[:, 0].permute(1, 2, 0)
    assert torch.equal(image, torch.from_numpy(picture(48, 64)))


@pytest.mark.usefixtures("with_torchcodec")
def test_bad_files_are_named_with_their_reasons_by_torchcodec(tmp_path):
    good = write_video(tmp_path / "good.mp4", grey_frames(40), options={"g": "5"})
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4096))
    (tmp_path / "half.mp4").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    cover = write_video(tmp_path / "damaged.mov", grey_frames(30), "png", "rgb24")
    data = bytearray(cover.read_bytes())
    start = data.index(b"IDAT", len(data) // 2)
    data[start : start + 40] = bytes(40)
    cover.write_bytes(data)
    for name, words in {
        "missing.mp4": "does not exist",
        "noise.mp4": "cannot be opened as video: invalid data found",
        "half.mp4": "truncated",
        write_audio(tmp_path / "sound.mp4").name: "no video stream",
        "damaged.mov": r"cannot be decoded after frame 1\d",
    }.items():
        with pytest.raises(VideoError, match=words) as caught:
            read_clips(tmp_path / name, [10], 15, 24, 32)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(VideoError, match="ends before frame 40"):
        read_clips(good, [40], 2, 24, 32)
    ts = write_video(tmp_path / "a.ts", grey_frames(30), options={"g": "5"})
    ts.write_bytes(ts.read_bytes()[: ts.stat().st_size // 2])
    assert read_clips(ts, [0], 5, 24, 32)[0].num_repeated == 0
    with pytest.raises(VideoError, match="ends before frame 29"):
        read_clips(ts, [29], 5, 24, 32)


@pytest.mark.usefixtures("with_torchcodec")
def test_torchcodec_writes_what_pyav_reads(tmp_path):
    frames = torch.from_numpy(np.stack([picture(48, 64)] * 5)).permute(3, 0, 1, 2).contiguous()
    path = tmp_path / "new" / "clip.mp4"
    write_mp4(path, iter([frames[:, :2], frames[:, 2:]]), 29.97)
    info = with_pyav.probe(path)
    assert (info.num_frames, info.height, info.width) == (5, 48, 64)
    assert info.fps == pytest.approx(29.97, abs=1e-3)
    pixels = np.stack([p for _, p in with_pyav.iter_pixels(path, range(5), Fit(48, 64))])
    expected = frames.permute(1, 2, 3, 0).numpy().astype(int)
    assert np.abs(pixels.astype(int) - expected).mean() < 6  # half the chroma, and x264
    assert [p.name for p in path.parent.iterdir()] == ["clip.mp4"]


@pytest.mark.usefixtures("with_torchcodec")
def test_what_the_frames_come_from_is_not_taken_for_the_encoder(tmp_path):
    """A GPU without memory is no bad video, and the mp4 is the user's, not a temporary file."""

    def frames():
        yield torch.zeros(3, 1, 48, 64, dtype=torch.uint8)
        raise torch.OutOfMemoryError("CUDA out of memory")

    check_writing()
    with pytest.raises(torch.OutOfMemoryError):
        write_mp4(tmp_path / "clip.mp4", frames(), 10)
    sizes = [torch.zeros(3, 1, 48, 64 + 2 * i, dtype=torch.uint8) for i in range(2)]
    with pytest.raises(VideoError, match=r"/clip\.mp4 cannot be written by torchcodec"):
        write_mp4(tmp_path / "clip.mp4", iter(sizes), 10)
    assert not list(tmp_path.iterdir())


@needs_samples
@pytest.mark.usefixtures("with_torchcodec")
@pytest.mark.parametrize(("size", "rare"), [((640, 1024), 16), ((96, 160), 6)])
def test_real_frames_are_within_the_stated_tolerance(size, rare):
    """docs/data.md: 1.5 levels in the mean; 99.9 % of the values within ``rare`` levels."""
    for name in ("0.mp4", "5.mp4", "input.jpg"):
        wanted, fit = [0, 7] if name.endswith("mp4") else [0], Fit(*size)
        expected = with_pyav.iter_pixels(SAMPLES_DIR / name, wanted, fit)
        found = choice.chosen().iter_pixels(SAMPLES_DIR / name, wanted, fit)
        for (_, pixels), (_, right) in zip(found, expected, strict=True):
            difference = np.abs(pixels.astype(int) - right.astype(int))
            assert difference.mean() <= 1.5
            assert np.quantile(difference, 0.999) <= rare
