"""How a model wants its clips laid out.

Flows in: a ``ModelConfig``. Flows out: the ``SequenceLayout`` that makes its batches.
"""

from __future__ import annotations

from cosmos_posttrain.data.batch import SequenceLayout
from cosmos_posttrain.models.config import ModelConfig


def sequence_layout(config: ModelConfig) -> SequenceLayout:
    """Base models: the clip alone. Video2World models: ``<bov>``, the clip, padding."""
    if config.is_video2world:
        return SequenceLayout(config.seq_length, (config.bov_token,), config.pad_token)
    return SequenceLayout(config.seq_length)
