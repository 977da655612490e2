"""What ``python -m cosmos_posttrain.tokenizer`` converts: settings, flags and checks. No torch.

Flows in: the command line. Flows out: a ``TokenizerConversionConfig``. (A network's own sizes are
``network.DVConfig``.)
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting

FORMATS = ("native", "torchscript")


@dataclass
class TokenizerConversionConfig:
    """Settings of a conversion.

    Attributes:
        source: Hugging Face id, folder, ``.jit`` file, or a shipped tokenizer's name.
        target: folder to write.
        target_format: ``native`` is ``config.json`` and ``model.safetensors``, ``torchscript``
            ``encoder.jit`` and ``decoder.jit``.
        overwrite: replace the files of an earlier conversion.
    """

    source: str = ""
    target: str = ""
    target_format: str = setting("native", choices=FORMATS)
    overwrite: bool = False


FLAGS = (
    Flag("--source"),
    Flag("--target"),
    Flag("--target_format"),
    Flag("--overwrite"),
)


def validate(config: TokenizerConversionConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.source:
        problems.append("--source is missing: name the tokenizer to convert")
    if not config.target:
        problems.append("--target is missing: name a folder")
    check(config, flag_names(FLAGS), problems)
