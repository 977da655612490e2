"""How many parameters a model has, whole and on one rank. Plain numbers, no torch.

Flows in: a ``ModelConfig`` and the sizes of the parallel groups. Flows out: counts that equal those
of the built models, rows that only pad the vocabulary, LoRA's factors and Medusa heads included.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.lora_config import ROW_PARALLEL
from cosmos_posttrain.models.lora_shapes import num_lora_parameters, target_shapes


@dataclass(frozen=True)
class LayerParameters:
    """Parameters of one transformer layer.

    Attributes:
        attention: query, key, value and output projections.
        cross_attention: the same towards the text; 0 in base models.
        mlp: SwiGLU's three matrices.
        norm: RMSNorm weights; every tensor-parallel rank holds all of them.
    """

    attention: int
    cross_attention: int
    mlp: int
    norm: int

    @property
    def matrices(self) -> int:
        """What tensor parallelism divides."""
        return self.attention + self.cross_attention + self.mlp


def layer_parameters(model: ModelConfig) -> LayerParameters:
    """Counts one layer."""
    hidden = model.hidden_size
    queries = model.num_attention_heads * model.kv_channels
    keys = model.num_query_groups * model.kv_channels
    text = model.context_dim
    return LayerParameters(
        attention=2 * hidden * queries + 2 * hidden * keys,
        cross_attention=0 if text is None else 2 * hidden * queries + 2 * text * keys,
        mlp=3 * hidden * model.ffn_hidden_size,
        norm=(2 * hidden + 2 * model.kv_channels)
        + (0 if text is None else hidden + 2 * model.kv_channels),
    )


def parameter_groups(model: ModelConfig) -> dict[str, int]:
    """Parameters of the whole model by kind, as built."""
    layer = layer_parameters(model)
    return {
        "embedding": model.padded_input_vocab_size * model.hidden_size,
        "attention": model.num_layers * layer.attention,
        "cross_attention": model.num_layers * layer.cross_attention,
        "mlp": model.num_layers * layer.mlp,
        "norm": model.num_layers * layer.norm + model.hidden_size,
        "output": model.padded_vocab_size * model.hidden_size,
        **({"lora": num_lora_parameters(model)} if model.lora is not None else {}),
        **({"medusa": head_parameters(model)} if model.num_medusa_heads else {}),
    }


def head_parameters(model: ModelConfig) -> int:
    """Of all Medusa heads, which every tensor-parallel rank of the last stage holds whole."""
    return model.num_medusa_heads * model.hidden_size**2


def trained_parameters(model: ModelConfig, heads_alone: bool = False) -> int:
    """Of the whole model, as built: under LoRA its factors and rows; Medusa heads alone; else all.

    Args:
        model: the model's numbers.
        heads_alone: all but the Medusa heads is frozen.
    """
    groups = parameter_groups(model)
    if heads_alone:
        return groups["medusa"]
    if model.lora is not None:
        return groups["embedding"] + groups["output"] + groups["lora"]
    return sum(groups.values())


def rank_parameters(model: ModelConfig, tensor: int, pipeline: int, stage: int) -> int:
    """Parameters that one GPU holds.

    Args:
        model: the model's numbers.
        tensor: tensor parallel size, which divides all matrices.
        pipeline: pipeline parallel size, which divides the layers.
        stage: the GPU's pipeline stage; the first holds the embedding, the last the output layer.
    """
    layer = layer_parameters(model)
    count = model.num_layers // pipeline * (layer.matrices // tensor + layer.norm)
    if stage == pipeline - 1:
        count += model.hidden_size + head_parameters(model)  # the last norm, the heads
    return count + _rows(model, tensor, pipeline, stage) + _factors(model, tensor, pipeline)


def rank_trained_parameters(
    model: ModelConfig, tensor: int, pipeline: int, stage: int, heads_alone: bool = False
) -> int:
    """Parameters of a GPU that are trained: under LoRA its factors and rows, else all.

    Args:
        model: as for ``rank_parameters``.
        tensor: as there.
        pipeline: as there.
        stage: as there.
        heads_alone: all but the Medusa heads is frozen.
    """
    if heads_alone:
        return head_parameters(model) if stage == pipeline - 1 else 0
    if model.lora is None:
        return rank_parameters(model, tensor, pipeline, stage)
    return _rows(model, tensor, pipeline, stage) + _factors(model, tensor, pipeline)


def _rows(model: ModelConfig, tensor: int, pipeline: int, stage: int) -> int:
    rows = model.padded_input_vocab_size if stage == 0 else 0
    rows += model.padded_vocab_size if stage == pipeline - 1 else 0
    return rows * model.hidden_size // tensor


def _factors(model: ModelConfig, tensor: int, pipeline: int) -> int:
    """LoRA's factors on one GPU: tensor parallelism divides one of each two."""
    if model.lora is None:
        return 0
    sides = 0
    for name, outputs, inputs in target_shapes(model, model.lora):
        is_row = name in ROW_PARALLEL
        sides += outputs + inputs // tensor if is_row else outputs // tensor + inputs
    return model.num_layers // pipeline * model.lora.rank * sides
