"""The command line of ``infer.py`` that gives a clip of the service again.

Flows in: the service's config, the name of an upload and the settings of its clip. Flows out: one
line for a shell.
"""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from cosmos_posttrain.inference.config import SESSION_FLAGS, SessionConfig
from cosmos_posttrain.serve.config import ServeConfig
from cosmos_posttrain.serve.settings import ClipSettings

# Said even where they are infer.py's defaults: they are what a clip is told apart by.
_ALWAYS = ("temperature", "top_p", "seed")


class ClipCommand:
    """Makes command lines for the clips of one service.

    Args:
        config: of the service.
        tensor_model_parallel_size: processes that share its model.
    """

    def __init__(self, config: ServeConfig, tensor_model_parallel_size: int) -> None:
        words = ["python", "infer.py"]
        if tensor_model_parallel_size > 1:
            words = ["torchrun", f"--nproc-per-node={tensor_model_parallel_size}", "infer.py"]
        usual = SessionConfig()
        for flag in SESSION_FLAGS:
            value = getattr(config, flag.target)
            if value != getattr(usual, flag.target) or flag.target == "ar_model_dir":
                words += _words(flag.name, value)
        if config.guardrail_dir is not None:
            words += _words("--guardrail_dir", config.guardrail_dir)
        self._words = words

    def line(self, file: str, settings: ClipSettings) -> str:
        """The line for an upload of that name, in the folder where the line is typed."""
        words = [*self._words, "--input_image_or_video_path", file]
        for item in fields(settings):
            value = getattr(settings, item.name)
            if value != item.default or item.name in _ALWAYS:
                words += _words(f"--{item.name}", value)
        name = f"{Path(file).stem}_seed{settings.seed}.mp4"
        return shlex.join([*words, "--video_save_name", name, "--disable_diffusion_decoder"])


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    text = str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]
