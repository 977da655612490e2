"""The settings of one clip, as a form gives them.

Flows in: the fields of a form, all of them text. Flows out: ``ClipSettings``, the ``Request`` that
they make with frames, or one sentence that names every problem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import ClipGeometry
from cosmos_posttrain.inference.request import DEFAULT_INPUT_FRAMES, Request

_MAX_PROMPT_LENGTH = 10_000
_NUMBERS = {
    "temperature": float,
    "top_p": float,
    "guidance_scale": float,
    "top_k": int,
    "seed": int,
    "num_input_frames": int,
}
_TEXTS = ("prompt", "negative_prompt")


@dataclass(frozen=True)
class ClipSettings:
    """How a clip is drawn; the fields are those of ``Request``, the defaults ``infer.py``'s."""

    temperature: float = 1.0
    top_p: float = 0.8
    top_k: int | None = None
    seed: int = 0
    num_input_frames: int | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    guidance_scale: float = 1.0

    @classmethod
    def from_form(cls, fields: Mapping[str, Any]) -> ClipSettings:
        """Reads a form; fields that are missing or empty keep their defaults.

        Raises:
            ConfigError: names every field that is unknown or no number.
        """
        problems, values = [], dict[str, Any]()
        for name, given in fields.items():
            text = str(given).strip()
            if name not in _NUMBERS and name not in _TEXTS:
                problems.append(f"there is no setting {name[:40]!r}")
            elif name in _TEXTS and len(text) > _MAX_PROMPT_LENGTH:
                problems.append(f"{name} has {len(text):,} characters, over {_MAX_PROMPT_LENGTH:,}")
            elif text:
                try:
                    values[name] = _NUMBERS.get(name, str)(text)
                except ValueError:
                    whole = "whole " if _NUMBERS[name] is int else ""
                    problems.append(f"{name} {text[:40]!r} is not a {whole}number")
        problems += [
            f"{name} must be finite"
            for name, value in values.items()
            if isinstance(value, float) and not math.isfinite(value)
        ]
        if not 0 <= values.get("seed", 0) < 2**63:
            problems.append(f"seed {values['seed']} must be at least 0 and below 2^63")
        if problems:
            raise ConfigError("; ".join(problems) + ".")
        return cls(**values)

    def frames_given(self, geometry: ClipGeometry) -> int:
        """Frames of a clip that are given; an image gives one.

        Raises:
            GeometryError: they do not fill whole latent frames, or leave nothing to generate.
        """
        count = self.num_input_frames or DEFAULT_INPUT_FRAMES
        geometry.num_condition_tokens(count)
        return count

    def request(self, frames: Tensor, fps: float) -> Request:
        """The request for a clip that begins with (3, T, H, W) uint8 frames.

        Raises:
            UserError: settings out of range.
        """
        return Request(
            frames=frames,
            fps=fps if 0 < fps < 1000 else None,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            guidance_scale=self.guidance_scale,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
        )
