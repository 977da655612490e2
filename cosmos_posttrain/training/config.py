"""What a training run is: its configuration, flags and checks. No torch.

Flows in: defaults < YAML < flags < overrides (``cli.py``). Flows out: a ``TrainConfig``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.data.paths import DataPaths, parse_data_path
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.hub import looks_like_hub_id
from cosmos_posttrain.models.config import LAYER_SPECS, ROPE_SCALINGS
from cosmos_posttrain.training.optimizer_config import (
    OPTIMIZER_FLAGS,
    OptimizerConfig,
    optimizer_problems,
)
from cosmos_posttrain.training.watching_config import (
    SAMPLES_FLAGS,
    SamplesConfig,
    profile_problems,
    retention_problems,
    samples_problems,
)
from cosmos_posttrain.transfer.config import COOCCURRENCE_INITS

EMBEDDING_INITS = ("keep", "reset", "mean", "aligned", "omp", "digits")
# Attention and norms keep little: see models/sdpa.py and models/norm.py.
RECOMPUTE_MODULES = ("mlp",)
# Not float16, whose gradients would need a loss scaler.
TRAINING_DTYPES = ("bfloat16", "float32")


@dataclass
class DataConfig:
    """The prepared data.

    Attributes:
        path: folder that prepare_dataset.py wrote, or the original recipe's layout; or several,
            with their shares of the samples as A:0.7,B:0.3, or without (then all clips alike).
        split_string: shares of train, validation and test by source video.
        seed: of the split and of the order of the clips.
        latent_shape: grid T,H,W; needed only for data without a manifest.
        vocab_size: vocabulary; needed only for data without a manifest.
        clips_per_video_per_epoch: largest number of each video's clips in an epoch, drawn anew for
            each; None means all.
    """

    path: Any = ""  # text, or a list of texts in YAML
    split_string: str = "98,1,1"
    seed: int = 1234
    latent_shape: str | None = None
    vocab_size: int | None = setting(None, at_least=1)
    clips_per_video_per_epoch: int | None = setting(None, at_least=1)

    @property
    def sources(self) -> DataPaths:
        """``path``, read.

        Raises:
            ConfigError: it is malformed.
        """
        return parse_data_path(self.path)


@dataclass
class ModelSourceConfig:
    """The model to start from.

    Attributes:
        path: Hugging Face id, folder, checkpoint, run folder, or random:<size>.
        layer_spec: ``torch`` (SDPA, everywhere) or ``te`` (Transformer Engine, GPU).
        dtype: ``bfloat16`` or ``float32``; None means bfloat16 on a GPU and float32 on the CPU.
        seed: of fresh weights.
        recompute: keep only layer inputs and compute activations again in the backward pass.
        recompute_modules: ``mlp`` computes only the feed-forward networks' again.
        compile: torch.compile of what stands between matrix products and attention (norms, RoPE,
            and on the CPU SwiGLU, which Megatron fuses on a GPU): faster, after some seconds at the
            first step, with other last bits.
        rope_scaling: ``none``, ``interpolate`` or ``yarn``, where the data's grid is larger than
            the checkpoint's.
        rope_scale: replaces the ratio of the two grids.
        embedding_init: what becomes of the checkpoint's token embeddings and output rows at the
            start of a run: ``keep``, ``reset``, ``mean``, ``aligned``, ``omp`` or ``digits``.
        cooccurrence_path: the file for ``aligned`` and ``omp``, see ``transfer/align.py``.
        lora_rank: train low-rank factors beside the frozen matrices of the layers, and embedding
            and output rows in full; None trains everything.
        lora_alpha: the factors' product counts ``lora_alpha / lora_rank`` times; None means once.
        lora_targets: the matrices, with commas between them: ``linear_qkv``, ``linear_proj``,
            ``linear_fc1``, ``linear_fc2``, and of Video2World models ``linear_q``, ``linear_kv``;
            None means all of them.
        num_medusa_heads: heads that guess tokens further ahead, from which decoding takes drafts;
            those that the checkpoint has are trained on, others begin anew, and 0 leaves its own
            out.
        medusa_freeze_backbone: train the Medusa heads alone, and leave all else as it is.
    """

    path: str = "nvidia/Cosmos-1.0-Autoregressive-4B"
    layer_spec: str = setting("torch", choices=LAYER_SPECS)
    dtype: str | None = setting(None, choices=TRAINING_DTYPES)
    seed: int = 1234
    recompute: bool = False
    recompute_modules: str | None = setting(None, choices=RECOMPUTE_MODULES)
    compile: bool = False
    rope_scaling: str = setting("none", choices=ROPE_SCALINGS)
    rope_scale: float | None = setting(None, at_least=1)
    embedding_init: str = setting("keep", choices=EMBEDDING_INITS)
    cooccurrence_path: str | None = None
    lora_rank: int | None = setting(None, at_least=1)
    lora_alpha: float | None = setting(None, above=0)
    lora_targets: str | None = None
    num_medusa_heads: int = setting(0, at_least=0)
    medusa_freeze_backbone: bool = True


@dataclass
class ParallelConfig:
    """Sizes of the parallel groups; what is left of the processes is data parallelism.

    Attributes:
        tensor_model_parallel_size: processes that share each layer.
        pipeline_model_parallel_size: processes that share the layers in sequence.
        virtual_pipeline_model_parallel_size: parts of the layers on each pipeline stage, taken
            in turn (an interleaved pipeline), so that stages wait less for one another; 1 is none.
        context_parallel_size: processes that share each clip.
        sequence_parallel: split activations between layers over the tensor-parallel processes.
        overlap_param_gather: data-parallel processes send one another their updated weights behind
            the next forward pass, layer by layer, not before it.
    """

    tensor_model_parallel_size: int = setting(2, at_least=1)
    pipeline_model_parallel_size: int = setting(1, at_least=1)
    virtual_pipeline_model_parallel_size: int = setting(1, at_least=1)
    context_parallel_size: int = setting(1, at_least=1)
    sequence_parallel: bool = False
    overlap_param_gather: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Tensor, pipeline and context parallel size."""
        return (
            self.tensor_model_parallel_size,
            self.pipeline_model_parallel_size,
            self.context_parallel_size,
        )

    def misfit(self, num_processes: int) -> str:
        """What so many processes lack, as the first half of a sentence; empty where they fit."""
        size = max(math.prod(self.sizes), 1)
        if num_processes % size == 0:
            return ""
        sizes = " x ".join(map(str, self.sizes))
        return (
            f"tensor x pipeline x context parallel size {sizes} needs a multiple of {size} "
            "processes"
        )


@dataclass
class TrainConfig:
    """A post-training run.

    Attributes:
        log_dir: run folder; a run in it is resumed.
        max_steps: optimizer steps; data repeats as often as needed.
        max_epochs: kept for the original's command lines: warns when it would stop earlier.
        global_batch_size: clips per optimizer step.
        micro_batch_size: clips per forward pass and data-parallel rank.
        save_every_n_steps: steps between checkpoints.
        async_save: write checkpoints while the steps go on, from a copy in host memory.
        val_check_interval: steps between validations; None means at every checkpoint.
        limit_val_batches: largest number of global batches per validation; 0 is no validation.
        save_top_k: checkpoints with the lowest validation loss that are kept beside the newest; -1
            keeps all, and so does leaving out both this and ``keep_last_n``.
        keep_last_n: newest checkpoints that are kept, whatever their loss.
        num_condition_latents: latent frames at each clip's start on which there is no loss.
        z_loss_coefficient: adds this times the squared log of the logits' sum of exponentials to
            what is minimised, not to the loss that is reported; 1e-4 is usual.
        prompt_dropout: probability of a clip to be trained without its text, which guidance needs;
            for Video2World data.
        skip_nonfinite: batches of a run that may be left out because their loss or gradient is
            not finite; one more ends the run.
        deterministic_mode: on a GPU, too, the same command gives the same numbers to the last bit;
            slower. On a CPU it does so anyway.
        distributed_timeout_minutes: how long a step, a save or a validation may take; then the rank
            that the others wait for is named and the run ends.
        profile_steps: first and last step to profile, as 10-12 (counted from 0): a trace of each
            rank, and of a GPU its memory; None profiles nothing.
        index_mapping_dir: kept for the original's command lines: no index files are written.
        num_threads: CPU threads per process; None means torch's own choice.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelSourceConfig = field(default_factory=ModelSourceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    log_dir: str = "./log_dir"
    max_steps: int = setting(100, at_least=1)
    max_epochs: int = setting(10, at_least=1)
    global_batch_size: int = setting(2, at_least=1)
    micro_batch_size: int = setting(1, at_least=1)
    save_every_n_steps: int = setting(100, at_least=1)
    async_save: bool = False
    val_check_interval: int | None = setting(None, at_least=1)
    limit_val_batches: int = setting(32, at_least=0)
    save_top_k: int | None = setting(None, at_least=-1)
    keep_last_n: int | None = setting(None, at_least=1)
    num_condition_latents: int = setting(0, at_least=0)
    z_loss_coefficient: float = setting(0.0, at_least=0)
    prompt_dropout: float = setting(0.0, at_least=0, below=1)
    skip_nonfinite: int = setting(0, at_least=0)
    deterministic_mode: bool = False
    distributed_timeout_minutes: float = setting(30.0, above=0, at_most=55)
    profile_steps: str | None = None
    index_mapping_dir: str | None = None
    num_threads: int | None = setting(None, at_least=1)


FLAGS = (
    Flag("--data_path", "data.path"),
    Flag("--clips_per_video_per_epoch", "data.clips_per_video_per_epoch"),
    Flag("--model_path", "model.path"),
    Flag("--log_dir"),
    Flag("--split_string", "data.split_string"),
    Flag("--index_mapping_dir"),
    Flag("--global_batch_size"),
    Flag("--micro_batch_size"),
    *OPTIMIZER_FLAGS,
    Flag("--max_steps"),
    Flag("--max_epochs"),
    Flag("--num_condition_latents"),
    Flag("--z_loss_coefficient"),
    Flag("--prompt_dropout"),
    Flag("--skip_nonfinite"),
    Flag("--save_every_n_steps"),
    Flag("--async_save"),
    Flag("--save_top_k"),
    Flag("--keep_last_n"),
    Flag("--val_check_interval"),
    Flag("--limit_val_batches"),
    *SAMPLES_FLAGS,
    Flag("--profile_steps"),
    Flag("--tensor_model_parallel_size", "parallel.tensor_model_parallel_size"),
    Flag("--pipeline_model_parallel_size", "parallel.pipeline_model_parallel_size"),
    Flag("--virtual_pipeline_model_parallel_size", "parallel.virtual_pipeline_model_parallel_size"),
    Flag("--context_parallel_size", "parallel.context_parallel_size"),
    Flag("--sequence_parallel", "parallel.sequence_parallel"),
    Flag("--overlap_param_gather", "parallel.overlap_param_gather"),
    Flag("--layer_spec", "model.layer_spec"),
    Flag("--dtype", "model.dtype"),
    Flag("--recompute", "model.recompute"),
    Flag("--recompute_modules", "model.recompute_modules"),
    Flag("--compile", "model.compile"),
    Flag("--rope_scaling", "model.rope_scaling"),
    Flag("--rope_scale", "model.rope_scale"),
    Flag("--embedding_init", "model.embedding_init"),
    Flag("--cooccurrence_path", "model.cooccurrence_path"),
    Flag("--lora_rank", "model.lora_rank"),
    Flag("--lora_alpha", "model.lora_alpha"),
    Flag("--lora_targets", "model.lora_targets"),
    Flag("--medusa_num_heads", "model.num_medusa_heads"),
    Flag("--medusa_freeze_backbone", "model.medusa_freeze_backbone"),
    Flag("--latent_shape", "data.latent_shape"),
    Flag("--vocab_size", "data.vocab_size"),
    Flag("--seed", "data.seed"),
    Flag("--deterministic_mode"),
    Flag("--distributed_timeout_minutes"),
    Flag("--num_threads"),
)


def validate(config: TrainConfig, world_size: int) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.data.path:
        problems.append("--data_path is missing: name the folder that prepare_dataset.py wrote")
    else:
        problems += _path_problems(config.data)
    problems += optimizer_problems(config.optimizer, config.max_steps, config.model.dtype)
    problems += retention_problems(
        config.save_top_k,
        config.keep_last_n,
        config.save_every_n_steps,
        config.val_check_interval,
    )
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        problems.append("--sequence_parallel needs --tensor_model_parallel_size above 1")
    if config.model.recompute and config.model.recompute_modules is not None:
        problems.append(
            f"--recompute_modules {config.model.recompute_modules} has no effect with --recompute, "
            "which computes everything again: give one of them"
        )
    if config.model.compile and config.model.layer_spec == "te":
        problems.append(
            "--compile has no effect with --layer_spec te, whose kernels are fused already: leave "
            "it out, or use --layer_spec torch"
        )
    problems += _embedding_problems(config.model)
    problems += _lora_problems(config.model)
    problems += _medusa_problems(config.model, parallel, config.optimizer)
    problems += _batch_problems(config, world_size)
    problems += samples_problems(
        config.samples, parallel.pipeline_model_parallel_size, parallel.context_parallel_size
    )
    problems += profile_problems(config.profile_steps, config.max_steps)
    check(config, flag_names(FLAGS), problems)


def _path_problems(data: DataConfig) -> list[str]:
    try:
        parse_data_path(data.path)
    except ConfigError as error:
        return [str(error).rstrip(".")]
    return []


def _embedding_problems(model: ModelSourceConfig) -> list[str]:
    init, path = model.embedding_init, model.cooccurrence_path
    if init in COOCCURRENCE_INITS and path is None:
        return [
            f"--embedding_init {init} needs --cooccurrence_path: write the file with python -m "
            "cosmos_posttrain.transfer"
        ]
    if init not in COOCCURRENCE_INITS and path is not None:
        return [
            f"--cooccurrence_path has no effect with --embedding_init {init}: give "
            f"{' or '.join(COOCCURRENCE_INITS)}"
        ]
    return []


def _lora_problems(model: ModelSourceConfig) -> list[str]:
    if model.lora_rank is None:
        given = [name for name in ("lora_alpha", "lora_targets") if getattr(model, name)]
        return [f"--{name} has no effect without --lora_rank" for name in given]
    if model.layer_spec == "te":
        return [
            "--lora_rank does not work with --layer_spec te, which computes a norm and the linear "
            "layer behind it in one, out of the factors' reach: use --layer_spec torch"
        ]
    return []


def _medusa_problems(
    model: ModelSourceConfig, parallel: ParallelConfig, optimizer: OptimizerConfig
) -> list[str]:
    if not model.num_medusa_heads:
        if model.medusa_freeze_backbone:
            return []
        return ["--no-medusa_freeze_backbone has no effect without --medusa_num_heads"]
    problems = []
    if parallel.virtual_pipeline_model_parallel_size > 1:
        problems.append("--medusa_num_heads needs --virtual_pipeline_model_parallel_size 1")
    if parallel.context_parallel_size > 1:
        problems.append("--medusa_num_heads needs --context_parallel_size 1")
    if model.lora_rank is not None:
        problems.append(
            "--medusa_num_heads and --lora_rank do not go together: train the heads on the merged "
            "model, in a run of their own"
        )
    if model.medusa_freeze_backbone:
        thaw = "give --no-medusa_freeze_backbone"
        if parallel.pipeline_model_parallel_size > 1:
            problems.append(
                "--medusa_num_heads with a frozen backbone needs --pipeline_model_parallel_size 1, "
                f"or {thaw}"
            )
        if model.embedding_init != "keep":
            problems.append(
                f"--embedding_init {model.embedding_init} makes rows that a frozen backbone never "
                f"learns to use: {thaw}, or train the heads in a run of their own"
            )
        if optimizer.freeze_body_steps:
            problems.append(
                f"--freeze_body_steps {optimizer.freeze_body_steps} trains nothing at all with a "
                f"frozen backbone: leave it out, or {thaw}"
            )
        if optimizer.embedding_lr is not None:
            problems.append(
                f"--embedding_lr {optimizer.embedding_lr} has no effect with a frozen backbone: "
                f"leave it out, or {thaw}"
            )
    return problems


def _batch_problems(config: TrainConfig, world_size: int) -> list[str]:
    parallel = config.parallel
    size = max(math.prod(parallel.sizes), 1)
    misfit = parallel.misfit(world_size)
    # Said before the model is downloaded; of one that is there, its own sizes are named later.
    if misfit and looks_like_hub_id(config.model.path):
        there = "is 1" if world_size == 1 else f"are {world_size}"
        return [
            f"{misfit}, but there {there}; start with torchrun --nproc-per-node={size}, or choose "
            "smaller sizes"
        ]
    data_parallel = max(world_size // size, 1)
    per_step = config.micro_batch_size * data_parallel
    if per_step < 1:
        return []
    if config.global_batch_size % per_step == 0:
        return _interleaving_problems(config, per_step)
    return [
        f"--global_batch_size {config.global_batch_size} is not a multiple of "
        f"--micro_batch_size {config.micro_batch_size} times {data_parallel} data-parallel "
        f"ranks; use a multiple of {per_step}"
    ]


def _interleaving_problems(config: TrainConfig, per_step: int) -> list[str]:
    parallel = config.parallel
    chunks, stages = (
        parallel.virtual_pipeline_model_parallel_size,
        parallel.pipeline_model_parallel_size,
    )
    if chunks == 1:
        return []
    if stages == 1:
        return [
            f"--virtual_pipeline_model_parallel_size {chunks} needs --pipeline_model_parallel_size "
            "above 1"
        ]
    if config.global_batch_size // per_step % stages == 0:
        return []
    return [
        f"--virtual_pipeline_model_parallel_size {chunks} takes {stages} micro-batches at a time: "
        f"--global_batch_size {config.global_batch_size} must be a multiple of {per_step * stages}"
    ]
