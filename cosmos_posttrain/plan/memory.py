"""Memory of one GPU during training, in bytes. Plain numbers, no torch.

Flows in: a model, a layout and the batch. Flows out: ``Memory`` of the pipeline stage that needs
most. The method is that of Korthikanti et al., 2022, "Reducing Activation Recomputation in Large
Transformer Models" (arXiv:2205.05198): add up what each operation keeps for its backward pass. The
terms are those of this package's ``torch`` layers (grouped queries, q/k norms, SwiGLU, fused
attention, norms that compute again what they do not keep); ``docs/plan.md`` derives them, and a
test compares them with what a real training step keeps.

Symbols: b micro-batch, S tokens of a clip, s = S / CP tokens of this rank, h hidden size, q and k
widths of all query and of all key heads, f SwiGLU width, V padded vocabulary, e bytes of a number
(2 in bfloat16, 4 in float32), t tensor parallel size, p = t with sequence parallelism, else 1.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cosmos_posttrain.models.config import ModelConfig, positions_at_once
from cosmos_posttrain.models.lora_shapes import target_shapes
from cosmos_posttrain.plan.parameters import (
    parameter_groups,
    rank_parameters,
    rank_trained_parameters,
    trained_parameters,
)

# The CUDA context, NCCL's channels and cuBLAS's workspaces; an assumption, not a measurement.
FRAMEWORK_BYTES = 2 * 2**30
# What the caching allocator loses between blocks, as a share of all it holds; an assumption.
FRAGMENTATION = 0.05

DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Layout:
    """How a model is spread over GPUs.

    Attributes:
        tensor: tensor parallel size.
        pipeline: pipeline parallel size.
        context: context parallel size.
        data: data parallel size.
        sequence_parallel: activations between the tensor-parallel layers are split too.
        recompute: only layer inputs are kept; the rest is computed again in the backward pass.
        virtual: parts of the layers that a pipeline stage takes in turn (interleaved); 1 is none.
        recompute_mlp: the feed-forward networks' activations are computed again.
    """

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    sequence_parallel: bool = False
    recompute: bool = False
    virtual: int = 1
    recompute_mlp: bool = False

    @property
    def num_gpus(self) -> int:
        """GPUs of the whole layout."""
        return self.tensor * self.pipeline * self.context * self.data


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        model: the model's numbers, with the latent shape to train on.
        micro_batch_size: clips per forward pass and data-parallel rank.
        global_batch_size: clips per optimizer step.
        dtype: ``bfloat16`` or ``float32``.
        distributed_optimizer: optimizer state is divided over the data-parallel ranks.
        keeps_average: an average of the weights is kept (``--ema_decay``).
        heads_alone: all but the model's Medusa heads is frozen.
        gpu_kernels: False counts the CPU's kernels: context parallelism needs masks there, float32
            attention takes grouped keys and values as they are, and the loss takes fewer positions
            at once.
        grad_reduce_in_bf16: gradients are kept in two bytes.
        offload_fraction: share of the optimizer that lies in host memory.
    """

    model: ModelConfig
    micro_batch_size: int = 1
    global_batch_size: int = 32
    dtype: str = "bfloat16"
    distributed_optimizer: bool = True
    keeps_average: bool = False
    heads_alone: bool = False
    gpu_kernels: bool = True
    grad_reduce_in_bf16: bool = False
    offload_fraction: float = 0.0

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return DTYPE_BYTES[self.dtype]

    @property
    def state_bytes(self) -> int:
        """The optimizer's, of a trained number: moments, float32 master weight, average."""
        return (8 if self.dtype == "float32" else 12) + 4 * self.keeps_average

    def num_microbatches(self, layout: Layout) -> int:
        """Forward passes of each data-parallel rank per optimizer step."""
        return self.global_batch_size // (self.micro_batch_size * layout.data)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment of a step.

    Attributes:
        weights: parameters, and the tables of positions.
        gradients: Megatron's gradient buffer.
        optimizer: float32 master weights, Adam's two moments, and the average where one is kept.
        activations: what the layers keep for the backward pass, over all batches in flight.
        logits: float32 softmax over the vocabulary, where it is small enough to be kept.
        working: the largest of the buffers that come and go.
        overhead: framework and fragmentation, by ``FRAMEWORK_BYTES`` and ``FRAGMENTATION``.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float
    overhead: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return sum(dataclasses.astuple(self))


def weight_bytes(work: Workload, layout: Layout, stage: int) -> float:
    """Parameters, in the training dtype."""
    return work.element_bytes * rank_parameters(work.model, layout.tensor, layout.pipeline, stage)


def table_bytes(work: Workload) -> float:
    """Positions: RoPE's cosines and sines and, in Video2World models, the absolute embedding."""
    model = work.model
    channels = 2 * model.kv_channels + (model.hidden_size if model.is_video2world else 0)
    return work.element_bytes * model.seq_length * channels


def gradient_bytes(work: Workload, layout: Layout, stage: int) -> float:
    """Megatron's gradient buffer: float32 unless asked for less, and whole on every rank."""
    return (2 if work.grad_reduce_in_bf16 else 4) * _trained(work, layout, stage)


def _trained(work: Workload, layout: Layout, stage: int) -> int:
    sizes = layout.tensor, layout.pipeline, stage
    return rank_trained_parameters(work.model, *sizes, work.heads_alone)


def _updated(work: Workload, layout: Layout, stage: int) -> float:
    """Trained numbers of which this rank keeps the optimizer's state."""
    ranks = layout.data * layout.context if work.distributed_optimizer else 1
    return _trained(work, layout, stage) / ranks


def optimizer_bytes(work: Workload, layout: Layout, stage: int) -> float:
    """AdamW: two float32 moments, and float32 master weights unless the weights are float32.

    Also the average of the weights, where one is kept. Without what lies in host memory.
    """
    return work.state_bytes * _updated(work, layout, stage) * (1 - work.offload_fraction)


def offloaded_bytes(work: Workload, layout: Layout) -> float:
    """Host memory of the process that needs most for ``--optimizer_cpu_offload``.

    Float32 weights, in either dtype, two moments, the average where one is kept, and a float32 copy
    of the gradients; or, where that is more, what Megatron holds while it builds the optimizer:
    float32 weights, and those of all data-parallel ranks beside them.
    """
    each = 16 + 4 * work.keeps_average

    def largest(stage: int) -> float:
        updated = _updated(work, layout, stage)
        return max(each * updated, 4 * (_trained(work, layout, stage) + updated))

    return max(largest(stage) for stage in range(layout.pipeline)) * work.offload_fraction


def host_bytes(work: Workload, layout: Layout) -> float:
    """Host memory of the process that needs most for ``--async_save``: its part of a checkpoint.

    That is what it updates; frozen weights are the first data-parallel rank's.
    """

    def of(stage: int) -> float:
        frozen = rank_parameters(work.model, layout.tensor, layout.pipeline, stage)
        frozen -= _trained(work, layout, stage)
        updated = _updated(work, layout, stage) * (work.element_bytes + work.state_bytes)
        return updated + work.element_bytes * frozen

    return max(of(stage) for stage in range(layout.pipeline))


def checkpoint_bytes(work: Workload) -> int:
    """A checkpoint on disk: the weights, and the optimizer's state of those that are trained."""
    whole = sum(parameter_groups(work.model).values())
    trained = trained_parameters(work.model, work.heads_alone)
    return work.element_bytes * whole + work.state_bytes * trained


def _norm_width_bytes(work: Workload) -> int:
    """RMSNorm keeps its input; its result is kept by the linear layer behind it."""
    return 2 * work.element_bytes


def _attention_bytes(work: Workload, layout: Layout) -> float:
    """Self-attention between its two linear layers, per token of this rank, for one clip."""
    model, e = work.model, work.element_bytes
    t, context = layout.tensor, layout.context
    queries = model.num_attention_heads * model.kv_channels / t
    keys = model.num_query_groups * model.kv_channels / t
    queries_bytes = 2 * e * queries  # rotated, and attention's output
    packed = e * (queries + 2 * keys)  # the projection's result, from which the norms start again
    # In float32 a GPU's kernel takes keys and values repeated for every head.
    repeated = work.dtype == "float32" and work.gpu_kernels and queries != keys
    if context == 1:
        return queries_bytes + 2 * e * (queries if repeated else keys) + packed
    # Every chunk of a rank keeps its own repeated copy of the keys before its end.
    gathered = 2 * e * (queries * (context + 0.5) if repeated else keys * context)
    joined = e * queries  # the outputs of the two chunks, one behind the other
    return queries_bytes + joined + gathered + packed


def _cross_attention_bytes(work: Workload, layout: Layout) -> float:
    """Cross-attention towards the text, with the norm before it, for one clip and layer."""
    model, e, t = work.model, work.element_bytes, layout.tensor
    if not model.is_video2world:
        return 0.0
    p = t if layout.sequence_parallel else 1
    heads, groups = model.num_attention_heads / t, model.num_query_groups / t
    queries, keys = heads * model.kv_channels, groups * model.kv_channels
    norm = model.hidden_size * _norm_width_bytes(work) / p
    per_token = norm + queries * 3 * e + 4 * (1 / p + 2 * heads)
    # Keys and values lie packed; keys are normalised.
    per_row = keys * 3 * e + 4 * groups
    return model.seq_length / layout.context * per_token + model.context_len * per_row


def _mask_bytes(work: Workload, layout: Layout) -> float:
    """The CPU's masks under context parallelism, of chunks r and 2 CP - 1 - r, in training dtype.

    On a GPU the kernel is told where a chunk stands, and neither mask nor scores exist.
    """
    if layout.context == 1 or work.gpu_kernels:
        return 0.0
    chunk = work.model.seq_length / (2 * layout.context)
    return work.element_bytes * (2 * layout.context + 1) * chunk**2


_MLP = ("linear_fc1", "linear_fc2")


def layer_activation_bytes(work: Workload, layout: Layout) -> float:
    """What one layer keeps for its backward pass without recomputation."""
    model, e, t = work.model, work.element_bytes, layout.tensor
    p = t if layout.sequence_parallel else 1
    norms = 2 * model.hidden_size * _norm_width_bytes(work) / p
    # The first linear's result, and the product; its input is counted with the norm.
    mlp = 0 if layout.recompute_mlp else 3 * e * model.ffn_hidden_size / t
    heads, groups = model.num_attention_heads / t, model.num_query_groups / t
    statistics = 4 * (2 / p + 2 * heads + groups)  # of the norms, and attention's log-sum-exp
    per_token = norms + _attention_bytes(work, layout) + mlp + statistics
    if model.lora is not None:  # what lies between its factors; norms, frozen, keep less than this
        names = [name for name, *_ in target_shapes(model, model.lora)]
        kept = [name for name in names if not (layout.recompute_mlp and name in _MLP)]
        per_token += e * model.lora.rank * len(kept)
    tokens = model.seq_length / layout.context
    per_clip = tokens * per_token + _cross_attention_bytes(work, layout)
    return work.micro_batch_size * per_clip + _mask_bytes(work, layout)


def head_activation_bytes(work: Workload, layout: Layout) -> float:
    """What the Medusa heads keep: of each its product before SiLU, and its hidden states."""
    t = layout.tensor
    tokens = work.model.seq_length / layout.context * work.micro_batch_size
    # Under sequence parallelism the first two are a rank's part; the states are then gathered.
    split = t if layout.sequence_parallel else 1
    per_token = work.element_bytes * work.model.hidden_size * (1 / split + 1)
    return work.model.num_medusa_heads * tokens * per_token


def _hidden_bytes(work: Workload, layout: Layout) -> float:
    """One tensor of hidden states, as it lies between two layers."""
    p = layout.tensor if layout.sequence_parallel else 1
    tokens = work.model.seq_length / layout.context * work.micro_batch_size
    return work.element_bytes * tokens * work.model.hidden_size / p


def stage_activation_bytes(work: Workload, layout: Layout, stage: int) -> float:
    """What one pipeline stage keeps for one micro-batch, without the logits."""
    model = work.model
    layers = model.num_layers // layout.pipeline
    p = layout.tensor if layout.sequence_parallel else 1
    tokens = model.seq_length / layout.context * work.micro_batch_size
    if work.heads_alone:  # nothing before the heads is kept, but what goes into them
        kept = _hidden_bytes(work, layout) + head_activation_bytes(work, layout) + 12 * tokens
        return kept if stage == layout.pipeline - 1 else 0.0
    kept = _hidden_bytes(work, layout) if layout.recompute else layer_activation_bytes(work, layout)
    total = layers * kept
    if model.context_dim is not None:  # the text, which all layers share
        text_rows = work.micro_batch_size * model.context_len
        total += work.element_bytes * text_rows * model.context_dim
    if layout.context > 1:  # this rank's rows of RoPE's table, for all layers
        total += 2 * work.element_bytes * model.kv_channels * tokens / work.micro_batch_size
    if stage == 0:
        total += 8 * tokens  # token ids
    if stage == layout.pipeline - 1:
        # The last norm's input and statistics; its result is whole before the output layer.
        total += tokens * (work.element_bytes * model.hidden_size + 4) / p
        total += tokens * work.element_bytes * model.hidden_size
        total += tokens * (8 + 4 + 4)  # labels, weights, log-sum-exp
        total += head_activation_bytes(work, layout)
    else:
        total += _hidden_bytes(work, layout)  # sent on
    return total


def _positions_at_once(work: Workload, layout: Layout) -> int:
    """Positions of this rank whose logits stand side by side."""
    device = "cuda" if work.gpu_kernels else "cpu"
    at_once = positions_at_once(work.model.padded_vocab_size // layout.tensor, device)
    return min(at_once, work.model.seq_length // layout.context * work.micro_batch_size)


def logits_bytes(work: Workload, layout: Layout, stage: int) -> float:
    """The softmax in float32, where the loss takes all positions at once; else it keeps none."""
    tokens = work.model.seq_length // layout.context * work.micro_batch_size
    kept = stage == layout.pipeline - 1 and _positions_at_once(work, layout) >= tokens
    if not kept or work.heads_alone:
        return 0.0
    return 4 * tokens * work.model.padded_vocab_size / layout.tensor


def _working_bytes(work: Workload, layout: Layout, stage: int) -> float:
    """The largest of the buffers that come and go; an upper estimate."""
    model, e, t = work.model, work.element_bytes, layout.tensor
    tokens = model.seq_length / layout.context * work.micro_batch_size
    full_hidden = e * tokens * model.hidden_size
    # Backward pass of a layer: gradients of SwiGLU's three tensors, and four of the hidden states'
    # size (residual, gathered input, gathered gradient, gradient before it is reduced).
    layer = 3 * e * tokens * model.ffn_hidden_size / t + 4 * full_hidden
    if layout.recompute or work.heads_alone:
        layer += layer_activation_bytes(work, layout)
    elif layout.recompute_mlp:
        layer += 3 * e * tokens * model.ffn_hidden_size / t
    loss = 0.0
    if stage == layout.pipeline - 1:
        # Logits of the positions that are taken at once, or only their copy in the model's dtype
        # where the softmax is kept; the weight's gradient, the input's.
        positions, columns = _positions_at_once(work, layout), model.padded_vocab_size / t
        wide = 0 if logits_bytes(work, layout, stage) else 4
        copies = positions * columns * (wide + (e if e == 2 else 0))
        loss = copies + e * columns * model.hidden_size + full_hidden
    return max(layer, loss)


def in_flight(work: Workload, layout: Layout, stage: int) -> float:
    """Micro-batches of which a stage keeps activations, in shares where it is interleaved.

    One forward, one backward: as many as there are stages from here. Interleaved, a stage takes
    more parts forward before its first backward (Narayanan et al., 2021, arXiv:2104.04473).
    """
    batches, virtual = work.num_microbatches(layout), layout.virtual
    if virtual == 1:
        return min(layout.pipeline - stage, batches)
    warm_up = 2 * (layout.pipeline - stage - 1) + (virtual - 1) * layout.pipeline
    return min(warm_up + 1, batches * virtual) / virtual


def stage_memory(work: Workload, layout: Layout, stage: int) -> Memory:
    """Memory of a GPU of one pipeline stage.

    A step has two peaks: the backward pass, with activations, and the optimizer's, when torch's
    AdamW holds one more float32 number for each parameter that it updates there, and a float32 copy
    of its gradient where that is bfloat16. The larger one counts.
    """
    weights = weight_bytes(work, layout, stage) + table_bytes(work)
    gradients = gradient_bytes(work, layout, stage)
    optimizer = optimizer_bytes(work, layout, stage)
    activations = in_flight(work, layout, stage) * stage_activation_bytes(work, layout, stage)
    logits = logits_bytes(work, layout, stage)
    working = _working_bytes(work, layout, stage)
    updated = _updated(work, layout, stage) * (1 - work.offload_fraction)
    update = (8 if work.grad_reduce_in_bf16 else 4) * updated
    working += max(0.0, update - activations - logits - working)
    held = weights + gradients + optimizer + activations + logits + working
    overhead = FRAMEWORK_BYTES + FRAGMENTATION * held
    return Memory(weights, gradients, optimizer, activations, logits, working, overhead)


def memory(work: Workload, layout: Layout) -> Memory:
    """Memory of the GPU that needs most."""
    stages = (stage_memory(work, layout, stage) for stage in range(layout.pipeline))
    return max(stages, key=lambda stage: stage.total)
