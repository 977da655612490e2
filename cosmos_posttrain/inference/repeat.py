"""The command that makes one clip again.

Flows in: the config of a run, and one request of it. Flows out: a command line, which does not
depend on the folder that it is run in as far as paths exist.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cosmos_posttrain.cli import Flag
from cosmos_posttrain.inference.config import FLAGS, InferConfig
from cosmos_posttrain.inference.request import Request

# Local folders or ids of the hub.
_PATHS = (
    *("ar_model_dir", "checkpoint_dir", "encoder_path", "decoder_path", "text_encoder_path"),
    *("input_image_or_video_path", "input_tokens_dir", "guardrail_dir"),
)


def command_of(
    config: InferConfig, request: Request, video: Path, tensor_model_parallel_size: int = 1
) -> str:
    """The command line for one clip of a run.

    Args:
        config: of the run.
        request: of the clip.
        video: the mp4 that it makes.
        tensor_model_parallel_size: processes that share the model.
    """
    source: dict[str, Any] = {}
    if request.path is not None:
        source = {"input_image_or_video_path": str(request.path), "prompt": request.prompt}
    config = dataclasses.replace(
        config,
        **source,
        batch_input_path=None,
        batch_size=1,
        max_clips=None,
        item=request.item or (0 if config.input_tokens_dir else None),
        num_samples=1,
        sample=request.sample or None,
        num_gpus=None,
        tensor_model_parallel_size=None,
        overwrite=False,
        video_save_name=str(video.resolve()),
        video_save_folder="outputs/",
    )
    size = tensor_model_parallel_size
    start = "python" if size == 1 else f"torchrun --nproc-per-node={size}"
    return f"{start} infer.py {shlex.join(_arguments(config, FLAGS))}"


def _arguments(config: Any, flags: Sequence[Flag]) -> list[str]:
    """Flags for what is not at its default."""
    defaults = {item.name: item.default for item in dataclasses.fields(config)}
    arguments = []
    for flag in flags:
        value = getattr(config, flag.target)
        if value == defaults[flag.target]:
            continue
        if isinstance(value, bool):
            arguments.append(flag.name if value else f"--no-{flag.name.lstrip('-')}")
        elif value is not None:
            local = flag.target in _PATHS and Path(value).exists()
            arguments += [flag.name, str(Path(value).resolve()) if local else str(value)]
    return arguments
