"""Model FLOPs of a training step, and the peaks that they are compared with. No torch.

Flows in: a model's numbers. Flows out: FLOPs of forward and backward for one token, as the metrics
and the planner report them.
"""

from __future__ import annotations

from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.lora_shapes import num_lora_parameters

# Dense bfloat16 peak in FLOP/s, from the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,  # SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,  # SXM, and GH200
    "H200 NVL": 835e12,
    "B200": 2250e12,
    "GB200": 2500e12,
}


def peak_flops(device_name: str) -> float | None:
    """The peak of a device, by the longest part of its name that is known; None where none is."""
    known = [part for part in PEAK_FLOPS if part in device_name]
    return PEAK_FLOPS[max(known, key=len)] if known else None


def flops_per_token(model: ModelConfig, heads_alone: bool = False) -> float:
    """Model FLOPs of forward and backward for one token (PaLM, arXiv:2204.02311, appendix B).

    Six per parameter that multiplies (the embedding does not), and causal attention's scores and
    values: 12 * layers * heads * head_dim * sequence length, halved by causality.

    Under LoRA a frozen matrix has no gradient of its own: four per parameter, and six per parameter
    of the factors and the output rows.

    A Video2World model also attends to all ``context_len`` rows of its text, without a mask. It
    projects them to keys and values once per clip, not once per token.

    A Medusa head takes its logits from the output layer, which learns nothing from it: four per
    weight of that.

    Args:
        model: its numbers.
        heads_alone: all but the Medusa heads is frozen: two per parameter of the backbone, whose
            attention costs a third, and four per parameter of the heads, behind which nothing lies.
    """
    width = model.num_attention_heads * model.kv_channels
    matrices = float(model.num_parameters - model.input_vocab_size * model.hidden_size)
    attention = 6.0 * model.num_layers * width * model.seq_length
    if model.context_dim is not None:
        keys = model.num_query_groups * model.kv_channels
        projections = model.num_layers * 2 * model.context_dim * keys
        matrices -= projections * (1 - model.context_len / model.seq_length)
        attention += 12.0 * model.num_layers * width * model.context_len
    heads = float(model.num_medusa_heads * model.hidden_size**2)
    logits = 4.0 * model.num_medusa_heads * model.vocab_size * model.hidden_size
    if heads_alone:
        return 2.0 * (matrices - heads) + 4.0 * heads + attention / 3 + logits
    if model.lora is None:
        return 6.0 * matrices + attention + logits
    output = float(model.vocab_size * model.hidden_size)
    return 4.0 * (matrices - output) + 6.0 * (output + num_lora_parameters(model)) + attention
