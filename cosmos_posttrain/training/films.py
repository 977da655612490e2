"""Sample clips as films: what was generated beside what really came.

Flows in: ``ContinuedClip``s, the data's tokenizer, and the source videos where they are at hand.
Flows out, on rank 0: for each clip a film (3, T, H, W) uint8 of panels with their names above,

    source video | reconstruction | generated | teacher-forced

and the same as an animated picture, smaller, which is what TensorBoard shows.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import ConfigError, DatasetError, TokenizerError
from cosmos_posttrain.geometry import Compression
from cosmos_posttrain.tokenizer.loading import check_recorded, load_tokenizer_pair
from cosmos_posttrain.tokenizer.video_tokenizer import VideoTokenizer
from cosmos_posttrain.training.sample_clips import ContinuedClip, num_given_latents
from cosmos_posttrain.training.watching_config import SamplesConfig
from cosmos_posttrain.video import read_clips, to_uint8

if TYPE_CHECKING:
    from numpy.typing import NDArray

SOURCE, RECONSTRUCTION = "source video", "reconstruction"
GENERATED, PREVIEW = "generated", "teacher-forced"
_DEFAULT_FPS = 24.0
_MAX_PICTURE_WIDTH = 1280
_WHITE = (255, 255, 255)


@dataclass(frozen=True)
class SampleFilm:
    """One clip's panels side by side.

    Attributes:
        number: of the clip in the split.
        frames: (3, T, H, W) uint8, H and W even.
        fps: frames a second.
    """

    number: int
    frames: NDArray[np.uint8]
    fps: float

    def picture(self) -> tuple[bytes, tuple[int, int]]:
        """A GIF of at most ``_MAX_PICTURE_WIDTH`` columns, without end, and its (height, width)."""
        from PIL import Image

        height, width = self.frames.shape[2:]
        scale = min(1.0, _MAX_PICTURE_WIDTH / width)
        size = round(width * scale), round(height * scale)
        images = [
            Image.fromarray(np.ascontiguousarray(frame)).resize(size, Image.Resampling.BOX)
            for frame in self.frames.transpose(1, 2, 3, 0)
        ]
        file = io.BytesIO()
        # GIF counts in hundredths of a second, and browsers take less than two of them for ten.
        pause = max(20, round(100 / self.fps) * 10)
        images[0].save(
            file, format="GIF", save_all=True, append_images=images[1:], duration=pause, loop=0
        )
        return file.getvalue(), (size[1], size[0])


class FilmMaker:
    """Makes films of sample clips; the tokenizer is loaded each time, and let go.

    Args:
        config: the run's.
        dataset: the split that the clips are of.
    """

    def __init__(self, config: SamplesConfig, dataset: TokenDataset) -> None:
        self._config, self._dataset = config, dataset

    @property
    def tokenizer_path(self) -> str:
        """As given, else as the data set names it."""
        return self._config.tokenizer_path or _contract(self._dataset).tokenizer.id

    def check(self, loads_tokenizer: bool = True) -> None:
        """Refuses what would fail after the first steps.

        Args:
            loads_tokenizer: False only looks at what lies beside its weights.

        Raises:
            DatasetError: the data set does not say what made its tokens.
            TokenizerError: the tokenizer is not at hand, or is another one.
            ConfigError: the source videos are not where they are said to be.
        """
        contract, videos = _contract(self._dataset), self._config.videos_dir
        try:
            if loads_tokenizer:
                load_checked(self._config, contract)
            elif self._config.tokenizer_path is None:
                check_recorded(contract.tokenizer.id)
        except TokenizerError as error:
            raise TokenizerError(
                f"--sample_every_n_steps needs the tokenizer that made the data, to decode: "
                f"{str(error).rstrip('.')}; name it with --sample_tokenizer_path, or leave samples "
                "out."
            ) from error
        for number in range(min(self._config.num_clips, len(self._dataset)) if videos else 0):
            source = self._dataset.source(number)
            if not (Path(videos or "") / source).is_file():
                raise ConfigError(
                    f"--sample_videos_dir {videos} has no {source}; give the folder that "
                    "prepare_dataset.py read, or leave it out."
                )

    def films(self, clips: list[ContinuedClip]) -> Iterator[SampleFilm]:
        """One clip's after another.

        Raises:
            UserError: the tokenizer or a source video cannot be read any more.
        """
        tokenizer = load_checked(self._config, _contract(self._dataset))
        for clip in clips:
            row = self._dataset.row(clip.number)
            fps = row.fps / row.stride
            panels = {RECONSTRUCTION: clip.truth, GENERATED: clip.generated, PREVIEW: clip.preview}
            frames = {name: _decode(tokenizer, tokens) for name, tokens in panels.items()}
            if self._config.videos_dir is not None:
                _, num_frames, height, width = frames[RECONSTRUCTION].shape
                path, stride = Path(self._config.videos_dir) / row.source, row.stride
                found = read_clips(path, [row.first_frame], num_frames, height, width, stride)
                frames = {SOURCE: found[0].frames} | frames
            yield SampleFilm(
                clip.number, side_by_side(frames), fps if 0 < fps < 1000 else _DEFAULT_FPS
            )


def check_samples(
    config: SamplesConfig,
    dataset: TokenDataset,
    num_condition_latents: int,
    is_dry: bool = False,
) -> None:
    """Refuses samples that could not be made; every rank calls it, before anything is written.

    Args:
        config: the run's.
        dataset: the split that the samples are of.
        num_condition_latents: the run's.
        is_dry: there are no process groups, and no weights are read.

    Raises:
        UserError: see ``FilmMaker.check`` and ``num_given_latents``.
    """
    if config.every_n_steps is not None:
        num_given_latents(num_condition_latents, dataset.latent_shape.time)
        maker = FilmMaker(config, dataset)
        if is_dry:
            maker.check(loads_tokenizer=False)
        else:
            groups.decide(maker.check)


def _contract(dataset: TokenDataset) -> Contract:
    if dataset.manifest is None:
        raise DatasetError(
            "the data set has no manifest, which says what tokenizer made it, so sample clips "
            "cannot be decoded; leave out --sample_every_n_steps, or prepare it again."
        )
    return dataset.manifest.contract


def load_checked(config: SamplesConfig, contract: Contract) -> VideoTokenizer:
    """The data's tokenizer, on this process's device.

    Raises:
        TokenizerError: it is not at hand, has other weights, or the data set names one that could
            run code.
    """
    info = contract.tokenizer
    path = config.tokenizer_path
    if path is None:
        path = info.id
        check_recorded(path)
    # Fresh networks draw weights, which are nobody else's random numbers.
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        tokenizer = load_tokenizer_pair(
            path,
            path,
            Compression(*info.compression),
            launch.device(),
            expected_sha256=info.sha256 or None,
        )
    if tokenizer.vocab_size != info.vocab_size:
        raise TokenizerError(
            f"{path} has {tokenizer.vocab_size} tokens and the data set {info.vocab_size}."
        )
    return tokenizer


def _decode(tokenizer: VideoTokenizer, tokens: Tensor) -> Tensor:
    """(T, h, w) tokens to (3, T, H, W) uint8 on the CPU."""
    return torch.cat(
        [to_uint8(part[0]).cpu() for part in tokenizer.decode_parts(tokens[None])], dim=1
    )


def side_by_side(panels: dict[str, Tensor]) -> NDArray[np.uint8]:
    """Panels (3, T, H, W) uint8 of one size, each under its name: (3, T, H + bar, N * W)."""
    from PIL import Image, ImageDraw, ImageFont

    _, num_frames, _, width = next(iter(panels.values())).shape
    size = max(10, width // 16)
    bar = 2 * (size * 3 // 4)
    title = Image.new("RGB", (width * len(panels), bar))
    font = ImageFont.load_default(size)
    for place, name in enumerate(panels):
        ImageDraw.Draw(title).text((place * width + 2, 0), name, _WHITE, font)
    pixels = np.asarray(title).transpose(2, 0, 1)[:, None]
    films = np.concatenate([panel.numpy() for panel in panels.values()], axis=3)
    found: NDArray[np.uint8] = np.concatenate([pixels.repeat(num_frames, axis=1), films], axis=2)
    return found
