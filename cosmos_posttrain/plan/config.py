"""What is planned: training or inference, the model, the GPUs and the batch. No torch.

Flows in: the command line. Flows out: a ``PlanConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.models.presets import PRESETS

# Larger numbers are slips of the pen, and would take long to divide.
MAX_GPUS, MAX_GPUS_PER_NODE = 100_000, 1_000
DTYPE_NAMES = {"bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32"}
DEFAULT_MODEL = "4B"
# Of the published models; a preset's name follows.
HUB_PREFIX = "nvidia/Cosmos-1.0-Autoregressive-"
# Share of a GPU's memory that a layout must leave free. The estimates count the CUDA context, NCCL
# and fragmentation by assumptions of their own; what they may be wrong by is this.
RESERVE = 0.08
# GPUs' memory in GiB, rounded as their names are.
GPU_MEMORY_GB = {"A100": 80.0, "H100": 80.0, "H200": 140.0, "B200": 178.0}


@dataclass
class PlanConfig:
    """What to plan.

    Attributes:
        inference: plan what generates clips, on one GPU, instead of training.
        model: a preset, a folder with a checkpoint or ``config.json``, a ``config.json`` or
            ``model.json``, or a Hugging Face id; by default 4B, and with ``inference`` all
            published sizes.
        gpus: GPUs in all.
        gpu_memory_gb: memory of one GPU in GiB; None means the usual one of ``gpu``.
        gpus_per_node: GPUs of one machine.
        gpu: kind of GPU, which gives peak and link speed: A100, H100, H200, B200, or any with
            ``peak_tflops``.
        peak_tflops: dense peak of one GPU in ``dtype``, in TFLOP/s; None means that of ``gpu``.
        link_gb_per_second: bandwidth between GPUs of a node and direction, in GB/s; None means
            that of ``gpu``.
        mfu: share of the peak before recomputation, bubble and transfers.
        latent_shape: grid T,H,W of a clip; None means the model's own.
        vocab_size: codes of the tokenizer; None means the model's own.
        batch_size: clips that are generated together, with ``inference``.
        micro_batch_size: clips per forward pass and data-parallel rank.
        global_batch_size: clips per optimizer step.
        dtype: of weights and activations.
        distributed_optimizer: divide optimizer state over data-parallel ranks.
        lora_rank: train low-rank factors beside frozen matrices, and embedding and output rows in
            full; None trains everything.
        ema_decay: keep an average of the weights; its number changes nothing here.
        grad_reduce_in_bf16: keep and sum gradients in bfloat16.
        optimizer_cpu_offload: keep the optimizer in host memory.
        optimizer_offload_fraction: share of the optimizer that lies there; None means all of it.
        async_save: write checkpoints from copies in host memory.
        num_medusa_heads: heads that guess tokens further ahead.
        medusa_freeze_backbone: train the Medusa heads alone.
        reserve: share of each GPU's memory that a layout must leave free.
        max_layouts: rows of the table.
        json: print JSON and nothing else.
    """

    inference: bool = False
    model: str | None = None
    gpus: int = setting(8, at_least=1, at_most=MAX_GPUS)
    gpu_memory_gb: float | None = setting(None, above=0)
    gpus_per_node: int = setting(8, at_least=1, at_most=MAX_GPUS_PER_NODE)
    gpu: str = "H100"
    peak_tflops: float | None = setting(None, above=0)
    link_gb_per_second: float | None = setting(None, above=0)
    mfu: float = setting(0.4, above=0, at_most=1)
    latent_shape: str | None = None
    vocab_size: int | None = setting(None, at_least=1)
    batch_size: int = setting(1, at_least=1)
    micro_batch_size: int = setting(1, at_least=1)
    global_batch_size: int = setting(32, at_least=1)
    dtype: str = setting("bf16", choices=tuple(DTYPE_NAMES))
    distributed_optimizer: bool = True
    lora_rank: int | None = setting(None, at_least=1)
    ema_decay: float | None = setting(None, at_least=0, below=1)
    grad_reduce_in_bf16: bool = False
    optimizer_cpu_offload: bool = False
    optimizer_offload_fraction: float | None = setting(None, above=0, at_most=1)
    async_save: bool = False
    num_medusa_heads: int = setting(0, at_least=0)
    medusa_freeze_backbone: bool = True
    reserve: float = setting(RESERVE, at_least=0, below=1)
    max_layouts: int = setting(10, at_least=1)
    json: bool = False

    @property
    def offload_fraction(self) -> float:
        """Share of the optimizer that lies in host memory."""
        return (self.optimizer_offload_fraction or 1.0) if self.optimizer_cpu_offload else 0.0


FLAGS = (
    Flag("--inference"),
    Flag(
        "--model",
        help=f"{', '.join(PRESETS)}, or a checkpoint, config.json or hub id; by default 4B, and "
        "with --inference all published sizes",
    ),
    Flag("--gpus"),
    Flag("--gpu_memory_gb"),
    Flag("--gpus_per_node"),
    Flag("--gpu"),
    Flag("--peak_tflops"),
    Flag("--link_gb_per_second"),
    Flag("--mfu"),
    Flag("--latent_shape"),
    Flag("--vocab_size"),
    Flag("--batch_size"),
    Flag("--micro_batch_size"),
    Flag("--global_batch_size"),
    Flag("--dtype"),
    Flag("--distributed_optimizer"),
    Flag("--lora_rank"),
    Flag("--ema_decay"),
    Flag("--grad_reduce_in_bf16"),
    Flag("--optimizer_cpu_offload"),
    Flag("--optimizer_offload_fraction"),
    Flag("--async_save"),
    Flag("--medusa_num_heads", "num_medusa_heads"),
    Flag("--medusa_freeze_backbone"),
    Flag("--reserve"),
    Flag("--max_layouts"),
    Flag("--json"),
)


def validate(config: PlanConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if config.gpus > config.gpus_per_node and config.gpus % max(config.gpus_per_node, 1):
        problems.append(
            f"--gpus {config.gpus} must be a multiple of --gpus_per_node {config.gpus_per_node}"
        )
    if config.gpu_memory_gb is None and config.gpu not in GPU_MEMORY_GB:
        problems.append(f"the memory of --gpu {config.gpu} is not known: give --gpu_memory_gb")
    if config.num_medusa_heads and config.lora_rank is not None:
        problems.append("--medusa_num_heads and --lora_rank do not go together")
    if config.grad_reduce_in_bf16 and DTYPE_NAMES.get(config.dtype) == "float32":
        problems.append(f"--grad_reduce_in_bf16 does not go with --dtype {config.dtype}")
    if config.optimizer_offload_fraction is not None and not config.optimizer_cpu_offload:
        problems.append(
            "--optimizer_offload_fraction has no effect without --optimizer_cpu_offload"
        )
    check(config, flag_names(FLAGS), problems)
