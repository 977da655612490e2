"""The model's numbers: presets, parallel sizes, the reference's config.json and back."""

from __future__ import annotations

import dataclasses
import json

import pytest

from cosmos_posttrain.errors import CheckpointError, ConfigError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig, from_reference, preset, to_reference


@pytest.mark.parametrize("name", ["tiny", "4B", "12B"])
def test_round_trips(name: str) -> None:
    config = preset(name)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert from_reference(json.loads(json.dumps(to_reference(config)))) == config


def test_published_sizes() -> None:
    # Named after the size without the embeddings; with both of them there are a few more.
    assert 4.0e9 < preset("4B").num_parameters < 4.5e9
    assert 11.0e9 < preset("12B").num_parameters < 13.0e9
    assert preset("12B").seq_length == 12800
    assert preset("4B").padded_vocab_size == 64000
    assert preset("tiny").padded_vocab_size == 1024


def test_a_preset_at_another_grid_and_vocabulary() -> None:
    config = preset("tiny", vocab_size=4096, latent_shape=LatentShape(3, 4, 5))
    assert (config.vocab_size, config.seq_length) == (4096, 60)


@pytest.mark.parametrize(("size", "words"), [(3, "num_attention_heads 8"), (0, "does not divide")])
def test_tensor_parallel_sizes_that_do_not_divide(size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        preset("tiny").check_tensor_parallel(size)
    assert "use one of 1, 2." in str(error.value)


def test_sizes_that_divide() -> None:
    preset("tiny").check_tensor_parallel(2)
    preset("4B").check_tensor_parallel(8)
    preset("tiny").check_pipeline_parallel(4)
    with pytest.raises(ConfigError, match="4 layers"):
        preset("tiny").check_pipeline_parallel(3)


def test_other_architectures_are_refused() -> None:
    values = to_reference(preset("12B"))
    for change in (
        {"insert_cross_attn": True},
        {"rope_dim": "1D"},
        {"use_qk_normalization": False},
    ):
        with pytest.raises(CheckpointError):
            from_reference(values | change)
    with pytest.raises(CheckpointError, match="lacks n_heads"):
        from_reference({k: v for k, v in values.items() if k != "n_heads"})
    with pytest.raises(CheckpointError, match="not one of ours"):
        ModelConfig.from_json({**dataclasses.asdict(preset("tiny")), "surprise": 1})
