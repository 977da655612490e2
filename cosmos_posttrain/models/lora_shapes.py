"""The LoRA of a model: checked, and counted. No torch.

Flows in: a model's numbers, and what a user asks for. Flows out: a ``LoraConfig`` that fits the
model, and how many parameters are trained.
"""

from __future__ import annotations

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.lora_config import (
    BASE_TARGETS,
    LORA_TARGETS,
    LoraConfig,
    parse_targets,
)


def lora_for(
    model: ModelConfig, rank: int | None, alpha: float | None, targets: str | None
) -> LoraConfig | None:
    """The LoRA that a user asks for, of a model.

    Args:
        model: the model's numbers.
        rank: None means no LoRA.
        alpha: None means the rank, so that the product counts once.
        targets: names with commas between them; None means every linear layer of the model.

    Raises:
        ConfigError: a layer that the model does not have, or a rank that saves nothing.
    """
    if rank is None:
        return None
    present = LORA_TARGETS if model.is_video2world else BASE_TARGETS
    named = present if targets is None else parse_targets(targets)
    absent = [name for name in named if name not in present]
    if absent:
        raise ConfigError(
            f"--lora_targets {targets} names {', '.join(absent)}, which a base model does not "
            f"have; use some of {', '.join(present)}."
        )
    lora = LoraConfig(rank, float(rank if alpha is None else alpha), named)
    smallest = min(min(shape[1:]) for shape in target_shapes(model, lora))
    if rank > smallest:
        raise ConfigError(
            f"--lora_rank {rank} is above {smallest}, the smaller side of one of the matrices; use "
            "a smaller rank, or leave it out to train all weights."
        )
    return lora


def target_shapes(model: ModelConfig, lora: LoraConfig) -> list[tuple[str, int, int]]:
    """(name, outputs, inputs) of the matrices of one layer that have factors."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    queries = model.num_attention_heads * model.kv_channels
    keys = model.num_query_groups * model.kv_channels
    shapes: dict[str, list[tuple[int, int]]] = {
        "linear_qkv": [(queries + 2 * keys, hidden)],
        "linear_proj": [(hidden, queries)],
        "linear_fc1": [(2 * ffn, hidden)],
        "linear_fc2": [(hidden, ffn)],
    }
    if model.context_dim is not None:
        shapes["linear_proj"].append((hidden, queries))
        shapes["linear_q"] = [(queries, hidden)]
        shapes["linear_kv"] = [(2 * keys, model.context_dim)]
    return [(name, *shape) for name in lora.targets for shape in shapes[name]]


def num_lora_parameters(model: ModelConfig) -> int:
    """What the factors have on top of ``num_parameters``; 0 without LoRA."""
    if model.lora is None:
        return 0
    sides = sum(outputs + inputs for _, outputs, inputs in target_shapes(model, model.lora))
    return model.num_layers * model.lora.rank * sides


def num_trained_parameters(model: ModelConfig) -> int:
    """All, or under LoRA its factors, the embedding and the output rows."""
    if model.lora is None:
        return model.num_parameters
    rows = model.input_vocab_size + model.vocab_size
    return num_lora_parameters(model) + rows * model.hidden_size
