"""What a checkpoint folder holds: NeMo's keys, stacked layers, Transformer Engine's norm names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from cosmos_posttrain.checkpoint import dist, mapping
from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.checkpoint.torch_dist_weights import write_torch_dist
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.naming import parameters_by_disk_name

pytestmark = pytest.mark.compat


@pytest.fixture(scope="module", params=["tiny", "tiny-video2world"])
def model(request: pytest.FixtureRequest) -> ARModel:
    return load_model(f"random:{request.param}", vocab_size=1000, seed=3)


def _on_disk(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    entries = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
    return {key: (tuple(e.size), e.properties.dtype) for key, e in entries.items()}


def _expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    layers, hidden, width = config.num_layers, config.hidden_size, config.kv_channels
    queries = config.num_attention_heads * width
    packed = queries + 2 * config.num_query_groups * width
    in_layer = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": (packed, hidden),
        "self_attention.q_layernorm.weight": (width,),
        "self_attention.k_layernorm.weight": (width,),
        "self_attention.linear_proj.weight": (hidden, queries),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * config.ffn_hidden_size, hidden),
        "mlp.linear_fc2.weight": (hidden, config.ffn_hidden_size),
    }
    if config.context_dim is not None:
        keys = 2 * config.num_query_groups * width
        in_layer |= {
            "pre_cross_attn_layernorm.weight": (hidden,),
            "cross_attention.linear_q.weight": (queries, hidden),
            "cross_attention.linear_kv.weight": (keys, config.context_dim),
            "cross_attention.q_layernorm.weight": (width,),
            "cross_attention.k_layernorm.weight": (width,),
            "cross_attention.linear_proj.weight": (hidden, queries),
        }
    # 1000 output rows and, with the special tokens, 1064 embedding rows, padded to 64s.
    rows = 1024 if config.context_dim is None else 1088
    shapes = {f"module.decoder.layers.{k}": (layers, *v) for k, v in in_layer.items()}
    return shapes | {
        "module.embedding.word_embeddings.weight": (rows, hidden),
        "module.output_layer.weight": (1024, hidden),
        "module.decoder.final_layernorm.weight": (hidden,),
    }


def test_both_writers_give_the_same_keys_and_shapes(model: ARModel, tmp_path: Path) -> None:
    for name in ("model", "plain"):
        (tmp_path / name).mkdir()
    dist.save(tmp_path / "model", model.module)
    whole = {name: p.detach() for name, p in parameters_by_disk_name(model.module)}
    write_torch_dist(tmp_path / "plain", model.config, whole.items())
    written = _on_disk(tmp_path / "model")
    assert {key: shape for key, (shape, _) in written.items()} == _expected(model.config)
    assert written == _on_disk(tmp_path / "plain")
    assert sorted(whole) == sorted(mapping.megatron_names(model.config))
    assert {dtype for _, dtype in written.values()} == {torch.float32}
