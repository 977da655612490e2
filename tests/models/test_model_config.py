"""The model's numbers: presets, parallel sizes, the reference's config.json and back."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from cosmos_posttrain.checkpoint import mapping
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import CheckpointError, ConfigError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.builder import build_model
from cosmos_posttrain.models.config import ROPE_SCALINGS, ModelConfig, YarnConfig
from cosmos_posttrain.models.presets import PRESETS, preset
from cosmos_posttrain.models.reference_config import from_reference, to_reference

# What model.json files of version 1 do not have.
ADDED_LATER = ("context_dim", "context_len", "position_scale")


LARGER = LatentShape(9, 60, 64)


def _round_trips(config: ModelConfig) -> None:
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert from_reference(json.loads(json.dumps(to_reference(config)))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_round_trips(name: str) -> None:
    _round_trips(preset(name))
    for scaling in ROPE_SCALINGS:
        _round_trips(preset(name).at_grid(LARGER, scaling))


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("tiny", 1_934_208),
        ("tiny-video2world", 2_266_944),
        ("4B", 4_014_088_192),
        ("12B", 11_560_975_360),
        ("5B-Video2World", 4_584_845_312),
        ("13B-Video2World", 13_323_125_760),
    ],
)
def test_published_sizes_are_those_of_the_built_models(name: str, num_parameters: int) -> None:
    config = preset(name)
    assert config.num_parameters == num_parameters
    shapes = mapping.reference_shapes(config).values()
    assert sum(math.prod(shape) for shape in shapes) == num_parameters
    groups.initialize(groups.Parallelism())
    built = sum(parameter.numel() for parameter in build_model(config, device="meta").parameters())
    assert built == num_parameters + config.num_padding_parameters


def test_published_lengths_and_vocabularies() -> None:
    base, text = preset("12B"), preset("13B-Video2World")
    assert (base.num_clip_tokens, base.seq_length) == (12800, 12800)
    assert (text.num_clip_tokens, text.seq_length) == (12801, 12864)
    assert (base.input_vocab_size, base.padded_vocab_size) == (64000, 64000)
    assert (text.input_vocab_size, text.vocab_size, text.padded_vocab_size) == (64064, 64000, 64000)
    assert (text.bov_token, text.pad_token) == (64000, 64002)
    assert (text.context_dim, text.context_len, text.num_padding_parameters) == (1024, 512, 0)
    assert preset("tiny").padded_vocab_size == 1024


def test_interpolation_squeezes_the_axes_that_grow() -> None:
    config = preset("4B").at_grid(LARGER, "interpolate")
    assert config.latent_shape == LARGER
    assert config.position_scale == (5 / 9, 40 / 60, 1.0)
    assert config.yarn is None
    # Once more, from the new grid; and back, where nothing is beyond what the weights know.
    again = config.at_grid(LatentShape(18, 60, 64), "interpolate")
    assert again.position_scale == (5 / 18, 40 / 60, 1.0)
    back = config.at_grid(LatentShape(5, 40, 64), "interpolate")
    assert back.position_scale == config.position_scale
    given = preset("4B").at_grid(LARGER, "interpolate", 2.0)
    assert given.position_scale == (0.5, 0.5, 1.0)


def test_yarn_goes_on_from_the_models_own() -> None:
    base = preset("4B").at_grid(LatentShape(10, 40, 64), "yarn")
    assert base.yarn == YarnConfig(LatentShape(5, 40, 64), 2.0)
    longer = preset("12B").at_grid(LatentShape(10, 40, 64), "yarn")
    assert longer.yarn == YarnConfig(LatentShape(3, 40, 64), 4.0)
    assert preset("12B").at_grid(LatentShape(10, 40, 64), "yarn", 3.0).yarn == YarnConfig(
        LatentShape(3, 40, 64), 6.0
    )
    squeezed = preset("4B").at_grid(LARGER, "interpolate").at_grid(LatentShape(9, 60, 96), "yarn")
    assert squeezed.yarn == YarnConfig(LatentShape(5, 40, 64), 1.5)


@pytest.mark.parametrize("scaling", ROPE_SCALINGS)
def test_smaller_grids_are_never_scaled(scaling: str) -> None:
    smaller = LatentShape(5, 20, 64)
    config = preset("12B").at_grid(smaller, scaling, 2.0)
    assert config == dataclasses.replace(preset("12B"), latent_shape=smaller)


def test_bad_scalings() -> None:
    with pytest.raises(ConfigError, match="use one of none, interpolate, yarn"):
        preset("4B").at_grid(LARGER, "ntk")
    with pytest.raises(ConfigError, match=r"rope_scale 0\.5 must be at least 1"):
        preset("4B").at_grid(LARGER, "yarn", 0.5)


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"apply_abs_pos_emb": False}, "only one of insert_cross_attn and apply_abs_pos_emb"),
        ({"context_dim": None}, "without a context_dim"),
        ({"insert_cross_attn_every_k_layers": 2}, "some layers only"),
        ({"pad_to_multiple_of": 128}, "a multiple of 128, not 64"),
        ({"rope_dim": "1D"}, "a RoPE of kind 1D"),
        ({"use_qk_normalization": False}, "no q/k normalisation"),
        ({"vocab_size_in": 64000}, "such a model has 64064 embedding rows"),
    ],
)
def test_other_architectures_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        from_reference(to_reference(preset("13B-Video2World")) | change)


def test_configs_that_are_not_ours() -> None:
    values = to_reference(preset("12B"))
    with pytest.raises(CheckpointError, match="lacks n_heads"):
        from_reference({k: v for k, v in values.items() if k != "n_heads"})
    with pytest.raises(CheckpointError, match="not one of ours"):
        ModelConfig.from_json({**dataclasses.asdict(preset("tiny")), "surprise": 1})
    old = {k: v for k, v in preset("tiny").to_json().items() if k not in ADDED_LATER}
    assert ModelConfig.from_json(old) == preset("tiny")


def test_impossible_numbers_are_named_together() -> None:
    changes = {"num_layers": 0, "hidden_size": 7, "context_dim": 0}
    with pytest.raises(ConfigError, match=r"num_layers 0 .*; context_dim 0 .*; hidden_size 7 "):
        dataclasses.replace(preset("tiny"), **changes)
    with pytest.raises(ConfigError, match="a multiple of num_query_groups 3"):
        dataclasses.replace(preset("tiny"), num_query_groups=3)
