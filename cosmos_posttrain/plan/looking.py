"""Finds the model that a run would start from, and reads nothing but its numbers.

Flows in: a model path as users give it. Flows out: a ``CheckpointSource``. Nothing is downloaded: a
published model's numbers are known, another one's must be on this machine.
"""

from __future__ import annotations

from pathlib import Path

from cosmos_posttrain import hub
from cosmos_posttrain.checkpoint.source import CheckpointSource, open_source
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.presets import PRESETS, preset
from cosmos_posttrain.plan.config import HUB_PREFIX


def look_at_source(path: str | Path) -> CheckpointSource:
    """As ``open_source``, without a network.

    Raises:
        CheckpointError: a Hugging Face id that is neither cached nor one of the published models.
        UserError: as ``open_source``.
    """
    text = str(path)
    if Path(text).exists() or not hub.looks_like_hub_id(text):
        return open_source(text)
    name = hub.split_revision(text)[0]
    size = name.removeprefix(HUB_PREFIX)
    if name != size and size in PRESETS:
        return CheckpointSource(Path(text), None, preset(size))
    folder = hub.cached(text)
    if folder is None:
        raise CheckpointError(
            f"{text} is not in the Hugging Face cache, so its numbers are not known without a "
            "download; run python -m cosmos_posttrain.download, or give a local folder."
        )
    return open_source(folder)
