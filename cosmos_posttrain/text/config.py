"""What ``python -m cosmos_posttrain.text`` converts: settings, flags and checks. No torch.

Flows in: the command line. Flows out: a ``TextEncoderConversionConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.text.shipped import TEXT_ENCODER_DTYPES


@dataclass
class TextEncoderConversionConfig:
    """Settings of a conversion.

    Attributes:
        source: a T5 encoder: folder, Hugging Face id, or ``tiny``.
        target: folder to write.
        dtype: of the tensors; without it they keep their own.
        overwrite: replace an earlier conversion.
    """

    source: str = ""
    target: str = ""
    dtype: str | None = setting(None, choices=TEXT_ENCODER_DTYPES)
    overwrite: bool = False


FLAGS = (
    Flag("--source"),
    Flag("--target"),
    Flag("--dtype"),
    Flag("--overwrite"),
)


def validate(config: TextEncoderConversionConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.source:
        problems.append("--source is missing: name the text encoder to convert")
    if not config.target:
        problems.append("--target is missing: name a folder")
    check(config, flag_names(FLAGS), problems)
