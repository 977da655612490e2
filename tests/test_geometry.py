"""Pixels to tokens: the published shapes, what is refused, and the sizes that a refusal names."""

from __future__ import annotations

import pytest

from cosmos_posttrain.errors import GeometryError
from cosmos_posttrain.geometry import (
    ClipGeometry,
    Compression,
    LatentShape,
    num_latent_frames,
    num_pixel_frames,
    parse_compression,
    parse_latent_shape,
)

DV4X8X8 = Compression(4, 8, 8)
DV8X8X8 = Compression(8, 8, 8)
DV8X16X16 = Compression(8, 16, 16)


@pytest.mark.parametrize(
    ("frames", "height", "width", "compression", "latent_shape", "seq_length"),
    [
        (17, 320, 512, DV4X8X8, (5, 40, 64), 12_800),
        (33, 640, 1024, DV8X16X16, (5, 40, 64), 12_800),
        (17, 256, 256, DV8X8X8, (3, 32, 32), 3_072),
        (17, 96, 160, DV4X8X8, (5, 12, 20), 1_200),
        (1, 8, 8, DV4X8X8, (1, 1, 1), 1),
    ],
)
def test_published_shapes(
    frames: int,
    height: int,
    width: int,
    compression: Compression,
    latent_shape: tuple[int, int, int],
    seq_length: int,
) -> None:
    geometry = ClipGeometry(frames, height, width, compression)
    assert geometry.latent_shape == latent_shape
    assert geometry.seq_length == seq_length
    assert geometry.latent_shape.tokens_per_frame == latent_shape[1] * latent_shape[2]


@pytest.mark.parametrize("text", ["4,8,8", "4x8x8", " 4, 8, 8 ", "[4,8,8]", "(4, 8, 8)"])
def test_compression_is_read_from_text(text: str) -> None:
    assert parse_compression(text) == DV4X8X8


def test_triples_are_read_from_sequences_and_printed() -> None:
    assert parse_compression([8, 16, 16]) == DV8X16X16
    assert parse_latent_shape((5, 40, 64)) == LatentShape(5, 40, 64)
    assert parse_latent_shape("5x40x64").num_tokens == 12_800
    assert DV8X16X16.name == "8x16x16"
    assert parse_compression(str(DV8X16X16)) == DV8X16X16


@pytest.mark.parametrize(
    "value", ["", "4,8", "4,8,8,8", "0,8,8", "-4,8,8", "4.5,8,8", "a,b,c", [], 4]
)
def test_what_is_no_triple_is_refused_with_an_example(value: str | list[int]) -> None:
    with pytest.raises(GeometryError, match="write it like 4,8,8"):
        parse_compression(value)
    with pytest.raises(GeometryError, match="write it like 5,40,64"):
        parse_latent_shape(value)


@pytest.mark.parametrize("compression", [DV4X8X8, DV8X8X8])
@pytest.mark.parametrize("num_latents", [1, 2, 3, 5, 16])
def test_frames_and_latents_invert_each_other(compression: Compression, num_latents: int) -> None:
    frames = num_pixel_frames(num_latents, compression)
    assert frames == 1 + (num_latents - 1) * compression.time
    assert num_latent_frames(frames, compression) == num_latents


@pytest.mark.parametrize(
    ("frames", "compression", "nearest"),
    [
        (16, DV4X8X8, "use 13 or 17."),
        (18, DV4X8X8, "use 17 or 21."),
        (16, DV8X8X8, "use 9 or 17."),
        (32, DV8X16X16, "use 25 or 33."),
        (2, DV4X8X8, "use 1 or 5."),
        (0, DV4X8X8, "use 1."),
        (-3, DV4X8X8, "use 1."),
    ],
)
def test_refused_frames_name_the_nearest(
    frames: int, compression: Compression, nearest: str
) -> None:
    with pytest.raises(GeometryError) as refusal:
        num_latent_frames(frames, compression)
    assert str(frames) in str(refusal.value)
    assert str(refusal.value).endswith(nearest)


@pytest.mark.parametrize(
    ("height", "width", "compression", "sentence"),
    [
        (320, 500, DV4X8X8, "width 500 .* positive multiple of 8; use 496 or 504"),
        (90, 160, DV4X8X8, "height 90 .* positive multiple of 8; use 88 or 96"),
        (640, 1000, DV8X16X16, "width 1000 .* positive multiple of 16; use 992 or 1008"),
        (5, 8, DV4X8X8, "height 5 .* positive multiple of 8; use 8"),
        (0, 8, DV4X8X8, "height 0 .* positive multiple of 8; use 8"),
        (-8, 8, DV4X8X8, "height -8 .* positive multiple of 8; use 8"),
    ],
)
def test_refused_sizes_name_the_nearest(
    height: int, width: int, compression: Compression, sentence: str
) -> None:
    with pytest.raises(GeometryError, match=sentence):
        ClipGeometry(17, height, width, compression)


def test_every_size_that_a_refusal_names_works() -> None:
    for frames in range(2, 40):
        try:
            num_latent_frames(frames, DV8X8X8)
        except GeometryError as refusal:
            named = str(refusal).rsplit("use ", 1)[1].rstrip(".").split(" or ")
            below, above = (int(number) for number in named)
            assert below < frames < above
            assert num_latent_frames(above, DV8X8X8) == num_latent_frames(below, DV8X8X8) + 1


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(GeometryError) as refusal:
        ClipGeometry(16, 99, 500, DV4X8X8)
    message = str(refusal.value)
    assert "\n" not in message
    assert all(size in message for size in ("16 frames", "height 99", "width 500"))
    assert all(size in message for size in ("13 or 17", "96 or 104", "496 or 504"))


@pytest.mark.parametrize(
    ("num_input_frames", "compression", "num_frames", "latents"),
    # 9 input frames are 3 latent frames at 4x8x8, and 2 at 8x8x8; 5 frames at 4x8x8 are 2.
    [(9, DV4X8X8, 17, 3), (9, DV8X8X8, 17, 2), (5, DV4X8X8, 17, 2), (1, DV8X16X16, 33, 1)],
)
def test_condition_tokens_follow_the_tokenizer(
    num_input_frames: int, compression: Compression, num_frames: int, latents: int
) -> None:
    geometry = ClipGeometry(num_frames, 320, 512, compression)
    tokens = geometry.num_condition_tokens(num_input_frames)
    assert tokens == latents * geometry.latent_shape.tokens_per_frame


def test_input_frames_must_fill_latents_and_leave_some_to_generate() -> None:
    geometry = ClipGeometry(17, 320, 512, DV4X8X8)
    with pytest.raises(GeometryError, match=r"6 input frames cannot be encoded.*use 5 or 9\."):
        geometry.num_condition_tokens(6)
    for num_input_frames in (17, 21):
        with pytest.raises(GeometryError, match=r"leave nothing to generate.*use at most 13\."):
            geometry.num_condition_tokens(num_input_frames)
