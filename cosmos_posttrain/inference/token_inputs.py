"""Clips that are given as tokens: a folder that was prepared, or the 1X challenge's as 1X ships it.

Flows in: a folder. Flows out: clips (T, H, W) of tokens by number, with their frame rate and text;
nothing is held for a clip but a number or two.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.layout import MANIFEST_FILE, PLAN_FILE
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.geometry import ClipGeometry, Compression, num_pixel_frames
from cosmos_posttrain.inference import opening
from cosmos_posttrain.inference.config import InferConfig
from cosmos_posttrain.prepare.onex.folder import METADATA_FILE, OnexFolder
from cosmos_posttrain.prepare.onex.windows import open_windows
from cosmos_posttrain.tokenizer.loading import check_recorded

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class TokenClip:
    """One clip.

    Attributes:
        tokens: (T, H, W) int64.
        fps: frames a second; None where unknown.
        text: (L, width) float32, what it was prepared with; None without one.
    """

    tokens: Tensor
    fps: float | None = None
    text: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class TokenFolder:
    """The clips of a folder.

    Attributes:
        path: the folder.
        geometry: of every clip.
        tokenizer: that made the tokens; its hash is "" where the folder does not say.
        num_clips: those that are whole and of one scene, numbered from 0.
        read: a clip by its number; raises DatasetError where it is damaged.
    """

    path: Path
    geometry: ClipGeometry
    tokenizer: TokenizerInfo
    num_clips: int
    read: Callable[[int], TokenClip]

    def settings(self, config: InferConfig) -> InferConfig:
        """A run's settings for these clips: what was not given follows from the folder."""
        clip = self.geometry
        found: dict[str, Any] = {
            "num_context_frames": clip.num_frames,
            "height": clip.height,
            "width": clip.width,
            "tokenizer_compression_factor": str(clip.compression),
        }
        values = {name: value for name, value in found.items() if getattr(config, name) is None}
        # Of a model that does not say which tokenizer it was trained on.
        if config.encoder_path is None and opening.open_checkpoint(config).contract is None:
            check_recorded(self.tokenizer.id)
            values["encoder_path"] = self.tokenizer.id
        return dataclasses.replace(config, **values)


def open_tokens(path: str) -> TokenFolder:
    """Opens a folder of either form; only its metadata are read.

    Raises:
        DatasetError: nothing is there, or it is damaged.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DatasetError(
            f"--input_tokens_dir {path} is not a folder; name one that prepare_dataset.py wrote, "
            "or one of the 1X World Model Challenge."
        )
    is_prepared = any((folder / name).is_file() for name in (MANIFEST_FILE, PLAN_FILE))
    if not is_prepared and (folder / METADATA_FILE).is_file():
        return _open_onex(folder)
    return _open_prepared(folder)


def _open_onex(folder: Path) -> TokenFolder:
    """Windows whose frames are of one segment: others show two scenes."""
    windows, fps = open_windows(folder), OnexFolder(folder).fps
    starts = windows.starts(1)
    time, rows, columns = windows.latent_shape
    rate = Compression(*windows.tokenizer.compression)
    frames = num_pixel_frames(time, rate)
    geometry = ClipGeometry(frames, rows * rate.height, columns * rate.width, rate)

    def read(number: int) -> TokenClip:
        tokens = torch.from_numpy(windows.tokens(int(starts[number])))
        return TokenClip(tokens.view(time, rows, columns), fps)

    return TokenFolder(folder, geometry, windows.tokenizer, len(starts), read)


def _open_prepared(folder: Path) -> TokenFolder:
    clips = TokenDataset(folder, "all")
    if clips.manifest is None:
        raise DatasetError(
            f"{folder} has no manifest, which says of what size and tokenizer its clips are; "
            "prepare it with prepare_dataset.py."
        )
    contract = clips.manifest.contract

    def read(number: int) -> TokenClip:
        row = clips.row(number)
        fps = row.fps / row.stride
        tokens = clips[number].view(*clips.latent_shape)
        return TokenClip(tokens, fps if 0 < fps < 1000 else None, clips.context(number))

    return TokenFolder(folder, contract.geometry, contract.tokenizer, len(clips), read)
