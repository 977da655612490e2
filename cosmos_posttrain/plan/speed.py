"""How long an optimizer step takes, from a stated share of the GPU's peak.

Flows in: a layout, a peak in FLOP/s, the share of it that matrix products reach, and the links'
bandwidth. Flows out: seconds and tokens per second. Counted: model FLOPs (``training/flops.py``),
the second forward pass of recomputation, the slowest pipeline stage and the pipeline's bubble, and
the transfers of tensor and context parallelism (not overlapped). Not counted: data parallelism's
transfers, which overlap or are small at these lengths, reading data, validation and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.plan.memory import Layout, Workload
from cosmos_posttrain.training.flops import PEAK_FLOPS, flops_per_token

# NVLink bandwidth per direction in bytes/s, from the vendors' data sheets.
LINK_BYTES_PER_SECOND = {"A100": 300e9, "H100": 450e9, "H200": 450e9, "B200": 900e9}

# Peak of float32 without TF32, which training does not use, from the same sheets.
FLOAT32_PEAK_FLOPS = {"A100": 19.5e12, "H100": 67e12, "H200": 67e12, "B200": 75e12}


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU.

    Attributes:
        name: as in the tables, or any other name.
        peak_flops: dense peak in FLOP/s, in the dtype that is trained in.
        link_bytes_per_second: bandwidth between two GPUs of a node, per direction.
        mfu: share of the peak that computation reaches without bubble, recomputation and transfers.
    """

    name: str
    peak_flops: float
    link_bytes_per_second: float
    mfu: float


@dataclass(frozen=True)
class Speed:
    """Expected speed of all GPUs together.

    Attributes:
        step_seconds: one optimizer step.
        tokens_per_second: tokens of the global batch by that time.
        mfu: model FLOPs by that time, as a share of all GPUs' peak.
        bubble: share of the time in which a pipeline stage waits.
    """

    step_seconds: float
    tokens_per_second: float
    mfu: float
    bubble: float


def hardware(
    name: str,
    mfu: float,
    peak_flops: float | None = None,
    link_bytes: float | None = None,
    dtype: str = "bfloat16",
) -> Hardware:
    """Looks a GPU up.

    Raises:
        ConfigError: a GPU without a known peak, and none was given.
    """
    peaks = FLOAT32_PEAK_FLOPS if dtype == "float32" else PEAK_FLOPS
    if peak_flops is None and name not in peaks:
        raise ConfigError(
            f"the peak of --gpu {name} is not known; use one of {', '.join(peaks)}, or give "
            "--peak_tflops."
        )
    return Hardware(
        name,
        peak_flops or peaks[name],
        link_bytes or LINK_BYTES_PER_SECOND.get(name, min(LINK_BYTES_PER_SECOND.values())),
        mfu,
    )


@dataclass(frozen=True)
class TokenFlops:
    """Model FLOPs of forward and backward for one token.

    Attributes:
        layers: the layers' matrices; frozen ones (LoRA) cost two thirds.
        attention: scores and values, halved by causality.
        output: the output layer, and Medusa heads with their logits.
    """

    layers: float
    attention: float
    output: float


def token_flops(model: ModelConfig, heads_alone: bool = False) -> TokenFlops:
    """Splits the FLOPs that the training metrics report."""
    width = model.num_attention_heads * model.kv_channels
    each = 2.0 if heads_alone else 6.0
    attention = each * model.num_layers * width * model.seq_length
    output = each * model.vocab_size * model.hidden_size
    head = (4.0 if heads_alone else 6.0) * model.hidden_size**2
    head += 4.0 * model.vocab_size * model.hidden_size
    output += model.num_medusa_heads * head
    whole = flops_per_token(model, heads_alone)
    return TokenFlops(whole - attention - output, attention, output)


def _transfer_bytes(work: Workload, layout: Layout) -> float:
    """What one layer sends for one micro-batch, forward and backward, per GPU.

    Tensor parallelism gathers and reduces hidden states around attention and around the MLP, four
    times in each direction. Context parallelism gathers keys and values, and sums their gradients.
    """
    model, e = work.model, work.element_bytes
    tokens = work.micro_batch_size * model.seq_length / layout.context
    passes = (
        1 if work.heads_alone else 3 if layout.recompute else 2.5 if layout.recompute_mlp else 2
    )
    hidden = e * tokens * model.hidden_size
    tensor = 4 * passes * hidden * (layout.tensor - 1) / layout.tensor
    keys = 2 * e * tokens * model.num_query_groups * model.kv_channels / layout.tensor
    context = (passes + 1) * keys * (layout.context - 1)
    return tensor + context


def speed(work: Workload, layout: Layout, gpu: Hardware) -> Speed:
    """Expected speed of one layout."""
    model = work.model
    flops = token_flops(model, work.heads_alone)
    layers = flops.layers + flops.attention
    if (
        layout.recompute and not work.heads_alone
    ):  # forward again, which is half of the work on a frozen matrix
        layers += flops.layers / (3 if model.lora is None else 2) + flops.attention / 3
    elif layout.recompute_mlp and not work.heads_alone:
        layers += 2 * 3 * model.hidden_size * model.ffn_hidden_size * model.num_layers
    tokens = work.micro_batch_size * model.seq_length
    # The last stage has the output layer beside its layers.
    stage_flops = tokens * (layers / layout.pipeline + flops.output)
    seconds = stage_flops / (layout.tensor * layout.context * gpu.peak_flops * gpu.mfu)
    layers_per_stage = model.num_layers // layout.pipeline
    seconds += layers_per_stage * _transfer_bytes(work, layout) / gpu.link_bytes_per_second
    num_microbatches = work.num_microbatches(layout)
    slots = num_microbatches + (layout.pipeline - 1) / layout.virtual
    step_seconds = slots * seconds
    rate = work.global_batch_size * model.seq_length / step_seconds
    return Speed(
        step_seconds,
        rate,
        rate * flops_per_token(model, work.heads_alone) / (gpu.peak_flops * layout.num_gpus),
        1 - num_microbatches / slots,
    )
