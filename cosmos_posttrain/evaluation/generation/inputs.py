"""What ``evaluate.py generate`` needs: a model, the clips of a split, and what really came.

Flows in: a ``GenerateEvalConfig``. Flows out: a ``Session`` for clips of the data set's size, and
``ClipInputs`` by number. The truth of a clip is its source video where ``--videos`` is given, cut
and resized as it was prepared; else it is the tokenizer's reconstruction of the stored tokens.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.manifest import DocumentRow
from cosmos_posttrain.errors import ConfigError, DatasetError, TokenizerError
from cosmos_posttrain.evaluation.config.generate import GenerateEvalConfig
from cosmos_posttrain.evaluation.config.loss import LossEvalConfig
from cosmos_posttrain.evaluation.loss_inputs import LossInputs, open_inputs
from cosmos_posttrain.evaluation.quality import SSIM_WINDOW
from cosmos_posttrain.evaluation.world_truth import WorldTruth, truth_path
from cosmos_posttrain.geometry import ClipGeometry
from cosmos_posttrain.inference.config import SessionConfig
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.tokenizer.loading import check_recorded
from cosmos_posttrain.video import read_clips

SOURCE_VIDEO, RECONSTRUCTION = "source video", "reconstruction of the stored tokens"
_NAME_LENGTH = 60
# Of the config, those that decide what comes out.
_SETTINGS = (
    *("split", "num_input_frames", "num_samples", "temperature", "top_p", "top_k", "seed"),
    *("guidance_scale", "sampson", "rope_scaling", "rope_scale", "layer_spec"),
)
_DEFAULT_FPS = 24.0


@dataclass(frozen=True)
class ClipInputs:
    """One clip.

    Attributes:
        name: of its folder.
        row: where it came from.
        tokens: (T, H, W) int64, all of the clip's.
        text: (L, width) float32; None for base data.
        frames: (3, T, H, W) uint8 of the source video; None where it is not looked for.
        world: its objects where it is of the small world; None else.
        fps: frames a second.
    """

    name: str
    row: DocumentRow
    tokens: Tensor
    text: Tensor | None
    frames: Tensor | None
    world: WorldTruth | None
    fps: float


class GenerateInputs:
    """Model and data that go together.

    Args:
        config: what to open.

    Attributes:
        session: for clips of the data set's size.
        numbers: of the split's clips to continue.
        num_given: frames that are given of each.
        notes: sentences for the user.

    Raises:
        UserError: the first thing that does not fit.
    """

    def __init__(self, config: GenerateEvalConfig) -> None:
        self._config = config
        self._opened = _open_data(config)
        self.clips: TokenDataset = self._opened.clips
        self.numbers = self._opened.numbers
        manifest = self.clips.manifest
        if manifest is None:
            raise DatasetError(
                f"{config.data_path} has no manifest, which says of what size and tokenizer its "
                "clips are; prepare it with prepare_dataset.py."
            )
        contract = manifest.contract
        self.num_given = config.num_input_frames
        _check_size(contract.geometry, self.num_given)
        self.session = Session(_session_config(config, self._opened, contract))
        if not config.allow_tokenizer_mismatch:
            _check_tokenizer(contract, self.session)
        self.notes = (*self._opened.notes, *self.session.notes)

    @property
    def truth(self) -> str:
        """What clips are scored against, in words."""
        return RECONSTRUCTION if self._config.videos is None else SOURCE_VIDEO

    def settings(self) -> dict[str, Any]:
        """All that decides the figures, but LPIPS' weights."""
        config, session = self._config, self.session
        opened, model = self._opened.settings(LossEvalConfig(dtype=config.dtype)), {}
        for key in ("model", "num_parameters", "is_video2world", "dataset", "dtype", "device"):
            model[key] = opened[key]
        clip = session.geometry
        return {
            **model,
            "split_string": self._opened.split.split_string,
            "split_seed": self._opened.split.seed,
            "num_clips": len(self.numbers),
            "num_clips_of_split": len(self.clips),
            "truth": self.truth,
            "tokenizer": dataclasses.asdict(session.tokenizer_info),
            "clip": {"num_frames": clip.num_frames, "height": clip.height, "width": clip.width},
            **{key: getattr(config, key) for key in _SETTINGS},
        }

    def read(self, number: int) -> ClipInputs:
        """A clip of the split.

        Raises:
            DatasetError: its tokens or its small world's truth cannot be read.
            VideoError: its source video cannot be read.
        """
        row = self.clips.row(number)
        frames, world = self._read_truth(row)
        stride_fps = row.fps / row.stride
        return ClipInputs(
            f"{number:05d}_{_plain(row.source)}",
            row,
            self.clips[number].view(*self.clips.latent_shape),
            self.clips.context(number),
            frames,
            world,
            stride_fps if 0 < stride_fps < 1000 else _DEFAULT_FPS,
        )

    def _read_truth(self, row: DocumentRow) -> tuple[Tensor | None, WorldTruth | None]:
        if self._config.videos is None:
            return None, None
        path, clip = Path(self._config.videos) / row.source, self.session.geometry
        size = (clip.num_frames, clip.height, clip.width)
        frames = read_clips(path, [row.first_frame], *size, stride=row.stride)[0].frames
        return frames, _world_of(path, row, clip)

    def request(self, clip: ClipInputs, number: int, sample: int) -> Request:
        """To continue a clip: its first tokens, and draws of its own."""
        config, geometry = self._config, self.session.geometry
        num_tokens = geometry.num_condition_tokens(self.num_given)
        latents = num_tokens // geometry.latent_shape.tokens_per_frame
        return Request(
            tokens=clip.tokens[:latents],
            context=clip.text,
            guidance_scale=config.guidance_scale,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=config.seed,
            item=number,
            sample=sample,
            fps=clip.fps,
        )


def _open_data(config: GenerateEvalConfig) -> LossInputs:
    """Split, model and contract as ``evaluate.py loss`` opens and checks them."""
    return open_inputs(
        LossEvalConfig(
            data_path=config.data_path,
            ar_model_dir=config.ar_model_dir,
            checkpoint_dir=config.checkpoint_dir,
            split=config.split,
            split_string=config.split_string,
            seed=config.split_seed,
            max_clips=config.max_clips,
            num_condition_latents=0,
            tensor_model_parallel_size=config.tensor_model_parallel_size or launch.world_size(),
            layer_spec=config.layer_spec,
            dtype=config.dtype,
            rope_scaling=config.rope_scaling,
            rope_scale=config.rope_scale,
            allow_tokenizer_mismatch=config.allow_tokenizer_mismatch,
        )
    )


def _check_size(geometry: ClipGeometry, num_given: int) -> None:
    geometry.num_condition_tokens(num_given)
    height, width = geometry.height, geometry.width
    if height % 2 or width % 2 or min(height, width) < SSIM_WINDOW:
        raise ConfigError(
            f"clips of {width}x{height} cannot be scored: SSIM needs {SSIM_WINDOW}x{SSIM_WINDOW} "
            "pixels, and an mp4 an even width and height; prepare larger ones."
        )


def _session_config(
    config: GenerateEvalConfig, opened: LossInputs, contract: Contract
) -> SessionConfig:
    """The session's part of the config, its clips as the data's are."""
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(SessionConfig)}
    clip, tokenizer = contract.clip, contract.tokenizer
    values |= {
        "num_context_frames": clip.num_frames,
        "height": clip.height,
        "width": clip.width,
        "tokenizer_compression_factor": ",".join(map(str, tokenizer.compression)),
    }
    # Of a model that does not say which tokenizer it was trained on.
    if config.encoder_path is None and opened.source.contract is None:
        check_recorded(tokenizer.id)
        values["encoder_path"] = tokenizer.id
    return SessionConfig(**values)


def _check_tokenizer(contract: Contract, session: Session) -> None:
    found = session.tokenizer_info
    if contract.tokenizer.sha256 != found.sha256:
        raise TokenizerError(
            f"the data set holds tokens of {contract.tokenizer.id} (sha256 "
            f"{contract.tokenizer.sha256[:12]}), but {found.id} has other weights (sha256 "
            f"{found.sha256[:12]}); restore that tokenizer, or try anyway with "
            "--allow_tokenizer_mismatch."
        )


def _world_of(path: Path, row: DocumentRow, clip: ClipGeometry) -> WorldTruth | None:
    """The objects of a small world's clip, of the clip's frames; None for other videos."""
    if len(path.parents) < 4 or not truth_path(path).is_file():
        return None
    world = WorldTruth.load(truth_path(path))
    last = len(world.positions) - 1
    numbers = np.minimum(row.first_frame + row.stride * np.arange(clip.num_frames), last)
    if (world.height, world.width) != (clip.height, clip.width):
        return None  # prepared in another size: where things are is not known to the pixel
    parts = ("positions", "velocities", "visible", "camera")
    return dataclasses.replace(world, **{name: getattr(world, name)[numbers] for name in parts})


def _plain(source: str) -> str:
    """A source's name as a folder may be called, its end where it is long."""
    stem = re.sub(r"\.\w+$", "", source)
    return re.sub(r"[^\w.-]+", "_", stem, flags=re.ASCII).strip("._")[-_NAME_LENGTH:] or "clip"
