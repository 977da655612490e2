"""What Video2World models have of their own: positions, special tokens, more rows in than out."""

from __future__ import annotations

import dataclasses
import math

import torch

from cosmos_posttrain.distributed import groups
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.absolute_positions import AbsolutePositions, sine_cosine_table
from cosmos_posttrain.models.builder import build_model
from cosmos_posttrain.models.config import AxisScale
from cosmos_posttrain.models.presets import preset


def test_absolute_positions() -> None:
    shape, hidden = LatentShape(3, 4, 5), 32
    table = sine_cosine_table(shape, hidden, AxisScale(1.0, 0.5, 1.0))
    assert table.shape == (60, hidden) and table.dtype == torch.bfloat16
    dims = (12, 10, 10)
    for position in (0, 1, 7, 33, 59):
        t, h, w = position // 20, position // 5 % 4 * 0.5, position % 5
        expected = []
        for place, dim in zip((t, h, w), dims, strict=True):
            angles = [place / 10000 ** (2 * i / dim) for i in range(dim // 2)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rounded = torch.tensor(expected, dtype=torch.float64).to(torch.bfloat16)
        assert torch.equal(table[position], rounded)


def test_the_first_row_and_the_padding_are_zero() -> None:
    config = preset("tiny-video2world", latent_shape=LatentShape(2, 3, 4))
    assert (config.num_clip_tokens, config.seq_length) == (25, 64)
    table = AbsolutePositions(config).table[:, 0]
    assert table.shape == (64, config.hidden_size)
    zero = (table == 0).all(dim=1)
    assert zero[0] and zero[25:].all() and not zero[1:25].any()


def test_the_table_is_one_and_not_in_checkpoints() -> None:
    groups.initialize(groups.Parallelism())
    config = preset("tiny-video2world", latent_shape=LatentShape(2, 3, 4))
    module = build_model(dataclasses.replace(config, num_layers=2))
    tables = {id(layer.positions.table) for layer in module.decoder.layers}
    assert len(tables) == 1
    assert not [name for name in module.state_dict() if "table" in name]
    assert not [name for name in module.sharded_state_dict() if "table" in name]


def test_output_rows_are_fewer_than_input_rows() -> None:
    groups.initialize(groups.Parallelism())
    module = build_model(preset("tiny-video2world", latent_shape=LatentShape(2, 3, 4)))
    output, embedding = module.output_layer.weight, module.embedding.word_embeddings.weight
    assert (output.shape[0], embedding.shape[0]) == (1024, 1088)  # 1,000 and 1,064, padded
    # Megatron's optimizer tells them from the other matrices by this.
    assert output.is_embedding_or_output_parameter and embedding.is_embedding_or_output_parameter
