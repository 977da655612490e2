"""How a model wants its clips laid out.

Flows in: a ``ModelConfig``. Flows out: the ``SequenceLayout`` that makes its batches.
"""

from __future__ import annotations

from cosmos_posttrain.data.batch import SequenceLayout
from cosmos_posttrain.models.config import ModelConfig


def sequence_layout(config: ModelConfig, num_given_latents: int = 0) -> SequenceLayout:
    """Base models: the clip alone. Video2World models: ``<bov>``, the clip, padding.

    Args:
        config: the model's.
        num_given_latents: latent frames at the clip's start on which there is no loss.
    """
    shape = config.latent_shape
    given = num_given_latents * shape.height * shape.width
    if config.is_video2world:
        prefix = (config.bov_token,)
        return SequenceLayout(config.seq_length, prefix, config.pad_token, num_given=given)
    return SequenceLayout(config.seq_length, num_given=given)
