"""All checkpoint formats. No torch.

Flows in: a folder. Flows out: the format of what lies there, and where exactly. Everything that
needs to know which formats exist asks here.
"""

from __future__ import annotations

from pathlib import Path

from cosmos_posttrain.checkpoint.formats.base import CheckpointFormat, WritableFormat
from cosmos_posttrain.checkpoint.formats.hf import HfFormat
from cosmos_posttrain.checkpoint.formats.megatron import MegatronFormat
from cosmos_posttrain.checkpoint.formats.megatron_bridge import MegatronBridgeFormat
from cosmos_posttrain.checkpoint.formats.nemo import NemoFormat
from cosmos_posttrain.checkpoint.formats.pt import PtFormat
from cosmos_posttrain.checkpoint.formats.safetensors import SafetensorsFormat
from cosmos_posttrain.checkpoint.formats.torch_dist import TorchDistFormat

# In the order in which they are looked for: a folder can be several, and then it is the first.
FORMATS: tuple[CheckpointFormat, ...] = (
    MegatronFormat(),
    PtFormat(),
    HfFormat(),
    SafetensorsFormat(),
    NemoFormat(),
    MegatronBridgeFormat(),
    TorchDistFormat(),
)
WRITABLE = {item.name: item for item in FORMATS if isinstance(item, WritableFormat)}
# Sets of files to ask a Hugging Face repository for, until the first pattern of one matches.
HUB_FILES = tuple(item.hub_files for item in FORMATS if item.hub_files)


def detect(folder: Path) -> tuple[CheckpointFormat, Path] | None:
    """The format of a folder and the checkpoint in it; None if there is none.

    Raises:
        CheckpointError: there is one, but it cannot be read.
    """
    for item in FORMATS:
        checkpoint = item.detect(folder)
        if checkpoint is not None:
            return item, checkpoint
    return None


def is_part(file: Path) -> bool:
    """Whether a file may be given in place of the checkpoint's folder."""
    return any(file.match(pattern) for pattern in parts())


def parts() -> list[str]:
    """Patterns of what checkpoints in any format consist of."""
    return sorted({pattern for item in FORMATS for pattern in item.parts})


def nothing_found() -> str:
    """What a folder without a model lacks, as the end of a sentence."""
    return f"neither {', nor '.join(item.title for item in FORMATS)}"
