"""Settings and flags of ``python -m cosmos_posttrain.reproduce``. No torch.

Flows in: the command line. Flows out: a ``ReproduceConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.cli import Flag


@dataclass
class ReproduceConfig:
    """Settings of a reproduction.

    Attributes:
        output: folder for logs, results and what the commands write.
        videos: folder of videos, for the figures that need one.
    """

    output: str = "reproduce_output"
    videos: str | None = None


FLAGS = (Flag("--output"), Flag("--videos"))
