"""Frame k is frame k, whatever the codec, and everything bad is refused in one sentence."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.reference import SAMPLES_DIR, needs_samples
from helpers.video_files import (
    B_FRAMES,
    FORMATS,
    ROTATE_90,
    ROTATE_180,
    ROTATE_270,
    frame_numbers,
    grey_frames,
    level,
    set_display_matrix,
    write_audio,
    write_video,
)
from PIL import Image, ImageCms

from cosmos_posttrain.errors import UserError
from cosmos_posttrain.video import (
    VideoError,
    decode,
    iter_clips,
    probe,
    read_clips,
    read_image,
    read_input,
    to_float,
    to_uint8,
    write_mp4,
)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "options"), FORMATS, ids=lambda v: str(v)[:24]
)
def test_every_frame_is_the_right_one_in_every_format(tmp_path, name, codec, pix_fmt, options):
    fps = 25 if codec == "mpeg2video" else 10
    path = write_video(tmp_path / name, grey_frames(50), codec, pix_fmt, fps, options)
    clips = read_clips(path, [31, 0, 13, 47], 5, 24, 32)
    assert [frame_numbers(clip.frames) for clip in clips] == [
        [31, 32, 33, 34, 35],
        [0, 1, 2, 3, 4],
        [13, 14, 15, 16, 17],
        [47, 48, 49, 49, 49],
    ]
    assert [clip.num_repeated for clip in clips] == [0, 0, 0, 2]
    assert clips[0].frames.shape == (3, 5, 24, 32) and clips[0].frames.dtype == torch.uint8
    info = probe(path)
    assert (info.num_frames, info.fps, info.height, info.width) == (50, fps, 48, 64)
    assert info.duration_seconds == pytest.approx(50 / fps, abs=5 / fps)


def test_stride_overlap_and_repeated_starts_in_one_pass(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(60), options=B_FRAMES)
    clips = read_clips(path, [20, 3, 20, 50], 4, 24, 32, stride=4)
    assert [frame_numbers(clip.frames) for clip in clips] == [
        [20, 24, 28, 32],
        [3, 7, 11, 15],
        [20, 24, 28, 32],
        [50, 54, 58, 58],
    ]
    assert [clip.start_frame for clip in iter_clips(path, [9, 2], 3, 24, 32)] == [2, 9]


def test_only_the_needed_frames_are_decoded(tmp_path, monkeypatch):
    path = write_video(
        tmp_path / "long.mp4", grey_frames(400, 32, 32), options={"g": "10", "sc_threshold": "0"}
    )
    decoded = []
    real = decode._decode_run

    def counting(container, stream, index, run):
        for packet_number, item in enumerate(real(container, stream, index, run)):
            decoded.append((run.key, packet_number))
            yield item

    monkeypatch.setattr(decode, "_decode_run", counting)
    monkeypatch.setattr(decode, "_decode_sequential", None)  # would mean decoding from the start
    clips = read_clips(path, [205, 371], 3, 32, 32)
    assert [frame_numbers(clip.frames)[0] for clip in clips] == [205 % 70, 371 % 70]
    assert {key for key, _ in decoded} == {200, 370}


def test_variable_frame_rate_counts_frames_not_time(tmp_path):
    gaps = [5, 10, 500, 20, 33, 900, 15, 40, 40, 7]
    pts = [int(value) for value in np.cumsum(gaps * 3)]
    path = write_video(tmp_path / "vfr.mp4", grey_frames(30), options=B_FRAMES, pts=pts)
    assert frame_numbers(read_clips(path, [4], 12, 24, 32)[0].frames) == list(range(4, 16))
    assert probe(path).num_frames == 30


CORNER_IMAGE = np.zeros((32, 64, 3), np.uint8)
CORNER_IMAGE[:16, :32] = 240  # top left is bright


@pytest.mark.parametrize(
    ("matrix", "shape", "bright"),
    [
        (ROTATE_90, (64, 32), (0, -1)),
        (ROTATE_180, (32, 64), (-1, -1)),
        (ROTATE_270, (64, 32), (-1, 0)),
    ],
)
def test_rotation_flags_put_the_picture_upright(tmp_path, matrix, shape, bright):
    path = write_video(tmp_path / "phone.mp4", [CORNER_IMAGE] * 3)
    set_display_matrix(path, matrix)
    assert (probe(path).height, probe(path).width) == shape
    image = read_clips(path, [1], 1, *shape)[0].frames[0, 0].float()
    corners = {(r, c): float(image[r, c]) for r in (0, -1) for c in (0, -1)}
    assert max(corners, key=lambda corner: corners[corner]) == bright
    assert sorted(corners.values())[2] < 30


def test_images_with_a_colour_profile_do_not_crash(tmp_path):
    """Reading such a frame's side data kills the interpreter when the frame is collected."""
    image = Image.fromarray(CORNER_IMAGE)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "profile.png", icc_profile=profile)
    script = (
        "import gc, sys; from cosmos_posttrain.video import read_image\n"
        "for _ in range(5): read_image(sys.argv[1], 16, 32); gc.collect()"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "profile.png")], check=True)


def test_resize_keeps_the_aspect_and_crops_the_centre(tmp_path):
    image = np.zeros((40, 120, 3), np.uint8)
    image[:, 40:80] = (200, 100, 50)  # the centre square
    path = write_video(tmp_path / "wide.mp4", [image] * 2, options={"crf": "1"})
    frames = read_clips(path, [0], 2, 80, 80)[0].frames
    inner = frames[:, :, :, 8:72].float().mean(dim=(1, 2, 3))
    assert torch.allclose(inner, torch.tensor([200.0, 100.0, 50.0]), atol=4)
    assert torch.equal(frames, read_clips(path, [0], 2, 80, 80)[0].frames)


def test_anamorphic_pixels_are_made_square(tmp_path):
    path = write_video(
        tmp_path / "dv.mp4", grey_frames(2, 48, 64), sample_aspect_ratio=Fraction(2, 1)
    )
    assert (probe(path).height, probe(path).width) == (48, 128)


def test_colours_survive_writing_and_reading(tmp_path):
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (37, 99, 180)]
    frames = torch.tensor(colours, dtype=torch.uint8).T[:, :, None, None].repeat(1, 1, 48, 64)
    write_mp4(tmp_path / "new" / "colours.mp4", frames, 24)
    for size in ((48, 64), (24, 32)):
        read = read_clips(tmp_path / "new" / "colours.mp4", [0], 6, *size)[0].frames
        expected = frames[:, :, :1, :1].float().expand(-1, -1, *size)
        # 8-bit YUV in limited range holds about 1 level less than RGB; x264 adds about 1.
        assert (read.float() - expected).abs().max() <= 3
    info = probe(tmp_path / "new" / "colours.mp4")
    assert (info.num_frames, info.fps) == (6, 24.0)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["colours.mp4"]


@pytest.mark.parametrize(("name", "mode"), [("a.png", "RGB"), ("a.webp", "RGB"), ("a.jpg", "L")])
def test_pictures_keep_their_colours_when_they_are_scaled(tmp_path, name, mode):
    """Scaling RGB goes through YUV: with two matrices, red came out as 233; grey JPEGs are full."""
    for colour in [(255, 0, 0), (200, 100, 50), (0, 255, 0)]:
        image = Image.new("RGB", (128, 96), colour).convert(mode)
        image.save(tmp_path / name, quality=98, lossless=True)
        expected = torch.tensor(image.convert("RGB").getpixel((0, 0)))
        for size in ((96, 128), (48, 64), (60, 200)):
            pixels = read_image(tmp_path / name, *size)[:, 0].int()
            assert (pixels - expected[:, None, None]).abs().max() <= 1


def test_full_range_video_is_not_stretched(tmp_path):
    path = write_video(tmp_path / "full.mov", grey_frames(3), "mjpeg", "yuvj420p")
    mean = read_clips(path, [0], 3, 24, 32)[0].frames.float().mean(dim=(0, 2, 3))
    assert torch.allclose(mean, torch.tensor([float(level(k)) for k in range(3)]), atol=2)


def test_write_refuses_what_h264_cannot_hold(tmp_path):
    good = torch.zeros(3, 2, 16, 16, dtype=torch.uint8)
    for frames, fps, words in [
        (good[:, :, :15], 10, "even"),
        (good[:, :0], 10, "at least one frame"),
        (good.float(), 10, "uint8"),
        (good[:2], 10, r"\(3, T, H, W\)"),
        (good, 0, "frames a second"),
    ]:
        with pytest.raises(VideoError, match=words):
            write_mp4(tmp_path / "x.mp4", frames, fps)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        write_mp4(tmp_path / "file" / "x.mp4", good, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_images_and_inputs(tmp_path):
    written = write_video(tmp_path / "still1.png", [CORNER_IMAGE], "png", "rgb24")
    path = written.rename(tmp_path / "still%d.PNG")  # a pattern to FFmpeg, a file to us
    image = read_image(path, 32, 64)
    assert image.shape == (3, 1, 32, 64)
    assert torch.equal(image[:, 0].permute(1, 2, 0), torch.from_numpy(CORNER_IMAGE))
    clip = read_input(path, 9, 32, 64)
    assert clip.frames.shape == (3, 1, 32, 64) and clip.num_repeated == 0
    video = write_video(tmp_path / "a.mp4", grey_frames(7))
    clip = read_input(video, 9, 32, 64)
    assert frame_numbers(clip.frames) == [0, 1, 2, 3, 4, 5, 6, 6, 6]
    assert (clip.start_frame, clip.num_repeated, clip.fps) == (0, 2, 10.0)


def test_float_and_uint8_are_inverse():
    levels = torch.arange(256, dtype=torch.uint8)
    video = to_float(levels)
    assert video.dtype == torch.float32 and video.min() == -1 and video.max() == 1
    assert torch.equal(to_uint8(video), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def _cut(path, source, fraction):
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path


def _bad_files(folder):
    good = write_video(folder / "good.mp4", grey_frames(40), options={"g": "5"})
    fast = write_video(folder / "fast.mp4", grey_frames(40), options={"g": "5"})
    write_mp4(fast, read_clips(good, [0], 40, 48, 64)[0].frames, 10)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is not a video\n" * 5)
    (folder / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(4096))
    (folder / "folder.mp4").mkdir()
    (folder / "playlist.mp4").write_text(f"#EXTM3U\n#EXTINF:4,\n{good}\n")
    return {
        "missing.mp4": "does not exist",
        "empty.mp4": "is empty",
        "text.mp4": "holds text",
        "playlist.mp4": "holds text",
        "folder.mp4": "is not a file",
        "noise.mp4": "cannot be opened",
        _cut(folder / "half.mp4", good, 0.5).name: "truncated",
        _cut(folder / "half-fast.mp4", fast, 0.7).name: "truncated: its 'mdat' part",
        _cut(folder / "head.mp4", fast, 0.05).name: "truncated",
        write_audio(folder / "sound.mp4").name: "no video stream",
    }


def test_each_bad_file_is_named_with_its_reason(tmp_path):
    for name, words in _bad_files(tmp_path).items():
        for read in (probe, lambda path: read_clips(path, [0], 5, 24, 32)):
            with pytest.raises(VideoError, match=words) as caught:
                read(tmp_path / name)
            assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.mov"])
def test_a_lost_tail_is_noticed_in_every_container_that_tells(tmp_path, name):
    whole = write_video(tmp_path / name, grey_frames(30), "mjpeg", "yuvj420p")
    assert probe(whole).num_frames == 30
    _cut(whole, whole, 0.9)
    with pytest.raises(VideoError, match="truncated"):
        read_clips(whole, [0], 5, 24, 32)


def test_a_lost_tail_of_a_stream_without_length_ends_the_video(tmp_path):
    path = write_video(tmp_path / "a.ts", grey_frames(30), options={"g": "5"})
    _cut(path, path, 0.5)
    assert read_clips(path, [0], 5, 24, 32)[0].num_repeated == 0
    with pytest.raises(VideoError, match="ends before frame 29"):
        read_clips(path, [29], 5, 24, 32)


def test_a_damaged_frame_is_refused_and_those_before_it_are_read(tmp_path):
    path = write_video(tmp_path / "a.mov", grey_frames(30), "png", "rgb24")
    data = bytearray(path.read_bytes())
    start = data.index(b"IDAT", len(data) // 2)
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    assert frame_numbers(read_clips(path, [0], 5, 24, 32)[0].frames) == [0, 1, 2, 3, 4]
    with pytest.raises(VideoError, match=r"cannot be decoded after frame 1\d"):
        read_clips(path, [10], 15, 24, 32)


def test_clips_past_the_end_and_impossible_sizes_are_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", grey_frames(10))
    with pytest.raises(VideoError, match="ends before frame 10"):
        read_clips(path, [10], 2, 24, 32)
    with pytest.raises(VideoError, match="at least 1"):
        read_clips(path, [0], 0, 24, 32)
    assert read_clips(path, [], 2, 24, 32) == []


@needs_samples
def test_real_clips():
    info = probe(SAMPLES_DIR / "0.mp4")
    assert (info.num_frames, info.fps, info.height, info.width) == (60, 30.0, 640, 1024)
    clip = read_clips(SAMPLES_DIR / "0.mp4", [50], 17, 96, 160)[0]
    assert clip.num_repeated == 7 and clip.frames.float().std() > 10
    assert read_image(SAMPLES_DIR / "input.jpg", 96, 160).float().std() > 10
