"""What a training run is: its configuration, flags and checks. No torch.

Flows in: defaults < YAML < flags < overrides (``cli.py``). Flows out: a ``TrainConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cosmos_posttrain.cli import Flag
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.models.config import ROPE_SCALINGS

EMBEDDING_INITS = ("keep", "reset", "mean", "aligned")


@dataclass
class DataConfig:
    """The prepared data set.

    Attributes:
        path: folder that prepare_dataset.py wrote, or the original recipe's layout.
        split_string: shares of train, validation and test by source video.
        seed: of the split and of the order of the clips.
        latent_shape: grid T,H,W; needed only for data without a manifest.
        vocab_size: vocabulary; needed only for data without a manifest.
    """

    path: str = ""
    split_string: str = "98,1,1"
    seed: int = 1234
    latent_shape: str | None = None
    vocab_size: int | None = None


@dataclass
class ModelSourceConfig:
    """The model to start from.

    Attributes:
        path: Hugging Face id, folder, checkpoint, run folder, or random:<size>.
        layer_spec: ``torch`` (SDPA, everywhere) or ``te`` (Transformer Engine, GPU).
        dtype: ``bfloat16`` or ``float32``; None means bfloat16 on a GPU and float32 on the CPU.
        seed: of fresh weights.
        recompute: keep only layer inputs and compute activations again in the backward pass.
        rope_scaling: ``none``, ``interpolate`` or ``yarn``, where the data's grid is larger than
            the checkpoint's.
        rope_scale: replaces the ratio of the two grids.
        embedding_init: what becomes of the checkpoint's token embeddings and output rows at the
            start of a run: ``keep``, ``reset``, ``mean`` or ``aligned``.
        cooccurrence_path: the file for ``aligned``, see ``transfer/align.py``.
    """

    path: str = "nvidia/Cosmos-1.0-Autoregressive-4B"
    layer_spec: str = "torch"
    dtype: str | None = None
    seed: int = 1234
    recompute: bool = False
    rope_scaling: str = "none"
    rope_scale: float | None = None
    embedding_init: str = "keep"
    cooccurrence_path: str | None = None


@dataclass
class ParallelConfig:
    """Sizes of the parallel groups; what is left of the processes is data parallelism."""

    tensor_model_parallel_size: int = 2
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    sequence_parallel: bool = False


@dataclass
class OptimizerConfig:
    """AdamW with warm-up and decay.

    Attributes:
        lr: peak learning rate.
        min_lr: learning rate at the end; None means a tenth of ``lr``.
        lr_warmup_steps: linear warm-up; None means a twentieth of the steps.
        lr_decay_style: ``cosine``, ``linear`` or ``constant``.
        weight_decay: decoupled, on matrices only.
        adam_beta1: decay of the first moment.
        adam_beta2: decay of the second moment.
        adam_eps: added to the root of the second moment.
        clip_grad: largest norm of the whole gradient; 0 means no clipping.
    """

    lr: float = 5e-5
    min_lr: float | None = None
    lr_warmup_steps: int | None = None
    lr_decay_style: str = "cosine"
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class TrainConfig:
    """A post-training run.

    Attributes:
        log_dir: run folder; a run in it is resumed.
        max_steps: optimizer steps.
        max_epochs: kept for the original's command lines: warns when it would stop earlier.
        global_batch_size: clips per optimizer step.
        micro_batch_size: clips per forward pass and data-parallel rank.
        save_every_n_steps: steps between checkpoints.
        val_check_interval: steps between validations; None means at every checkpoint.
        limit_val_batches: largest number of global batches per validation.
        index_mapping_dir: kept for the original's command lines: no index files are written.
        num_threads: CPU threads per process; None means torch's own choice.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelSourceConfig = field(default_factory=ModelSourceConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    log_dir: str = "./log_dir"
    max_steps: int = 100
    max_epochs: int = 10
    global_batch_size: int = 2
    micro_batch_size: int = 1
    save_every_n_steps: int = 100
    val_check_interval: int | None = None
    limit_val_batches: int = 32
    index_mapping_dir: str | None = None
    num_threads: int | None = None


FLAGS = (
    Flag("--data_path", "data.path", "folder that prepare_dataset.py wrote"),
    Flag("--model_path", "model.path", "model to start from: id, folder, run or random:<size>"),
    Flag("--log_dir", "log_dir", "run folder; a run in it is resumed"),
    Flag("--split_string", "data.split_string", "shares of train,validation,test"),
    Flag("--index_mapping_dir", "index_mapping_dir", "accepted; no index files are needed"),
    Flag("--global_batch_size", "global_batch_size", "clips per optimizer step"),
    Flag("--micro_batch_size", "micro_batch_size", "clips per forward pass and rank"),
    Flag("--lr", "optimizer.lr", "peak learning rate"),
    Flag("--min_lr", "optimizer.min_lr", "final learning rate; a tenth of --lr unless given"),
    Flag("--lr_warmup_steps", "optimizer.lr_warmup_steps", "5% of the steps unless given"),
    Flag(
        "--lr_decay_style",
        "optimizer.lr_decay_style",
        "shape after the warm-up",
        choices=("cosine", "linear", "constant"),
    ),
    Flag("--weight_decay", "optimizer.weight_decay", "decoupled weight decay on matrices"),
    Flag("--clip_grad", "optimizer.clip_grad", "largest gradient norm; 0 means no clipping"),
    Flag("--max_steps", "max_steps", "optimizer steps; data repeats as often as needed"),
    Flag("--max_epochs", "max_epochs", "warns when it would stop before --max_steps"),
    Flag("--save_every_n_steps", "save_every_n_steps", "steps between checkpoints"),
    Flag("--val_check_interval", "val_check_interval", "steps between validations"),
    Flag("--limit_val_batches", "limit_val_batches", "global batches per validation"),
    Flag(
        "--tensor_model_parallel_size",
        "parallel.tensor_model_parallel_size",
        "processes that share each layer",
    ),
    Flag(
        "--pipeline_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
        "processes that share the layers in sequence",
    ),
    Flag(
        "--context_parallel_size",
        "parallel.context_parallel_size",
        "processes that share each clip",
    ),
    Flag("--sequence_parallel", "parallel.sequence_parallel", "split activations between layers"),
    Flag("--layer_spec", "model.layer_spec", "modules of a layer", choices=("torch", "te")),
    Flag("--dtype", "model.dtype", "bfloat16 on a GPU, float32 on the CPU unless given"),
    Flag("--recompute", "model.recompute", "recompute activations in the backward pass"),
    Flag(
        "--rope_scaling",
        "model.rope_scaling",
        "positions beyond the checkpoint's grid",
        choices=ROPE_SCALINGS,
    ),
    Flag("--rope_scale", "model.rope_scale", "replaces the ratio of the two grids"),
    Flag(
        "--embedding_init",
        "model.embedding_init",
        "rows of the new tokens: the checkpoint's, fresh, its mean, or aligned by co-occurrence",
        choices=EMBEDDING_INITS,
    ),
    Flag(
        "--cooccurrence_path",
        "model.cooccurrence_path",
        "file of python -m cosmos_posttrain.transfer, for --embedding_init aligned",
    ),
    Flag("--latent_shape", "data.latent_shape", "grid T,H,W of data without a manifest"),
    Flag("--vocab_size", "data.vocab_size", "vocabulary of data without a manifest"),
    Flag("--seed", "data.seed", "of the split and the order of the clips"),
    Flag("--num_threads", "num_threads", "CPU threads per process"),
)


def validate(config: TrainConfig, world_size: int) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.data.path:
        problems.append("--data_path is missing: name the folder that prepare_dataset.py wrote")
    for name in ("max_steps", "global_batch_size", "micro_batch_size", "save_every_n_steps"):
        if getattr(config, name) < 1:
            problems.append(f"--{name} {getattr(config, name)} must be at least 1")
    if config.optimizer.lr <= 0:
        problems.append(f"--lr {config.optimizer.lr} must be above 0")
    min_lr = config.optimizer.min_lr
    if min_lr is not None and not 0 <= min_lr <= config.optimizer.lr:
        problems.append(f"--min_lr {min_lr} must lie between 0 and --lr {config.optimizer.lr}")
    warmup = config.optimizer.lr_warmup_steps
    if warmup is not None and not 0 <= warmup < config.max_steps:
        problems.append(f"--lr_warmup_steps {warmup} must be below --max_steps {config.max_steps}")
    parallel = config.parallel
    if parallel.sequence_parallel and parallel.tensor_model_parallel_size == 1:
        problems.append("--sequence_parallel needs --tensor_model_parallel_size above 1")
    problems += _embedding_problems(config.model)
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    _validate_batch(config, world_size)


def _embedding_problems(model: ModelSourceConfig) -> list[str]:
    init, path = model.embedding_init, model.cooccurrence_path
    if init not in EMBEDDING_INITS:
        return [f"--embedding_init {init} is not one of {', '.join(EMBEDDING_INITS)}"]
    if init == "aligned" and path is None:
        return [
            "--embedding_init aligned needs --cooccurrence_path: write the file with python -m "
            "cosmos_posttrain.transfer"
        ]
    if init != "aligned" and path is not None:
        return [f"--cooccurrence_path has no effect with --embedding_init {init}: give aligned"]
    return []


def _validate_batch(config: TrainConfig, world_size: int) -> None:
    parallel = config.parallel
    model_size = (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )
    data_parallel = max(world_size // max(model_size, 1), 1)
    per_step = config.micro_batch_size * data_parallel
    if config.global_batch_size % per_step:
        raise ConfigError(
            f"--global_batch_size {config.global_batch_size} is not a multiple of "
            f"--micro_batch_size {config.micro_batch_size} times {data_parallel} data-parallel "
            f"ranks; use a multiple of {per_step}."
        )
