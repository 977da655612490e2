"""Setting a run up: what is opened and checked, in the order in which it can fail.

Flows in: a ``TrainConfig``. Flows out: ``Inputs`` (data, the model to start from, the run folder),
of which ``building.py`` makes the model. Nothing is written before all of it fits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.context import SamplingInfo, SplitInfo, TrainingData
from cosmos_posttrain.checkpoint.dist import quiet_megatron_logging
from cosmos_posttrain.checkpoint.source import CheckpointSource, open_source
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.order import Order, make_order
from cosmos_posttrain.data.serial import to_plain
from cosmos_posttrain.data.splits import parse_split_string
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.distributed.determinism import deterministic
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import parse_latent_shape
from cosmos_posttrain.models.builder import CosmosGPTModel
from cosmos_posttrain.models.chunks import ModelChunks
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.lora_config import LoraConfig
from cosmos_posttrain.models.lora_shapes import lora_for, num_trained_parameters
from cosmos_posttrain.runlog import wants_wandb
from cosmos_posttrain.training import heads, texts
from cosmos_posttrain.training.building import check_division, training_dtype
from cosmos_posttrain.training.config import DataConfig, TrainConfig, validate
from cosmos_posttrain.training.films import check_samples
from cosmos_posttrain.training.run_folder import RunFolder
from cosmos_posttrain.transfer import advice
from cosmos_posttrain.transfer.embedding import Transfer, plan_transfer


@dataclass
class Inputs:
    """What a run starts from.

    Attributes:
        train_data: the training split.
        order: in which the clips of the training split come.
        val_data: the validation split; None where validation is off.
        folder: the run folder, held against other runs.
        resume_from: the run's own last checkpoint; None for a new run.
        source: the model to start from, at the data's grid.
        transfer: other rows for the new tokens; None keeps the source's.
        parallelism: sizes of the parallel groups.
        lora: the factors that are trained beside frozen matrices; None trains everything.
        num_medusa_heads: that the model is trained with.
    """

    train_data: TokenDataset
    order: Order
    val_data: TokenDataset | None
    folder: RunFolder
    resume_from: Path | None
    source: CheckpointSource
    transfer: Transfer | None
    parallelism: groups.Parallelism
    lora: LoraConfig | None = None
    num_medusa_heads: int = 0

    @property
    def model_config(self) -> ModelConfig:
        """The numbers of the model that is trained."""
        start = self.source.config if self.transfer is None else self.transfer.config
        return dataclasses.replace(start, lora=self.lora, num_medusa_heads=self.num_medusa_heads)

    def load_weights(self, model: CosmosGPTModel | ModelChunks) -> None:
        """Fills a built model at the start of a run."""
        (self.transfer or self.source).load_weights(model)


@dataclass(frozen=True)
class DryRun:
    """A look at what a run would do, in which nothing is written or downloaded.

    Attributes:
        world_size: processes of the run.
        open_source: finds a model without a network.
    """

    world_size: int
    open_source: Callable[[str | Path], CheckpointSource]


def open_inputs(
    config: TrainConfig,
    closing: contextlib.ExitStack,
    takes_text: bool = False,
    dry: DryRun | None = None,
) -> Inputs:
    """Opens everything and checks that it fits together.

    Args:
        config: the run's.
        closing: gets what must be closed at the run's end.
        takes_text: whether data and model must be of Video2World, or must not.
        dry: only looks; makes no process groups and holds no folder.

    Raises:
        UserError: the first thing that does not fit.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    quiet_megatron_logging()
    world_size = launch.world_size() if dry is None else dry.world_size
    validate(config, world_size)
    if dry is None:
        training_dtype(config)
        if config.deterministic_mode:
            closing.enter_context(deterministic())
    wants_wandb()
    sizes = groups.Parallelism(
        config.parallel.tensor_model_parallel_size,
        config.parallel.pipeline_model_parallel_size,
        config.parallel.context_parallel_size,
        config.parallel.virtual_pipeline_model_parallel_size,
    )
    train_data = open_split(config.data, "train")
    order = training_order(config.data, train_data)
    val_data = _open_validation(config, train_data)
    texts.check_data(config, train_data, takes_text)
    if dry is None:
        groups.start()
    check_samples(
        config.samples, val_data or train_data, config.num_condition_latents, dry is not None
    )
    folder = RunFolder(config.log_dir, describe(train_data, config.data))
    closing.callback(folder.close)
    resume_from = folder.open() if dry is None else folder.look()
    settings = config.model
    find = open_source if dry is None else dry.open_source
    source = find(resume_from or settings.path).at_grid(
        train_data.latent_shape,
        settings.rope_scaling,
        settings.rope_scale,
        train_data.vocab_size,
    )
    source = texts.checked_source(source, train_data)
    transfer = None
    if resume_from is None:
        transfer = _plan_transfer(config, source, train_data, folder)
    if transfer is None and source.config.vocab_size != train_data.vocab_size:
        raise ConfigError(
            f"the model predicts {source.config.vocab_size} tokens but the data set has a "
            f"vocabulary of {train_data.vocab_size}; use a tokenizer with the same number of "
            "codes, give --embedding_init aligned (or omp, digits, mean, reset), or start from "
            "random:<size>."
        )
    heads.check(config, source, resume_from)
    if resume_from is None:
        folder.record_start(_describe_start(config, source, folder, transfer))
    lora = lora_for(source.config, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
    if resume_from is not None:
        _check_same_lora(resume_from, lora)
    inputs = Inputs(
        *(train_data, order, val_data, folder, resume_from, source, transfer, sizes, lora),
        settings.num_medusa_heads,
    )
    check_division(inputs.model_config, sizes, config.parallel.sequence_parallel, world_size)
    return inputs


def _check_same_lora(resume_from: Path, lora: LoraConfig | None) -> None:
    """Refuses to go on with other factors than a run began with.

    Raises:
        ConfigError: names both.
    """
    before = context.read_model_config(resume_from).lora
    if before != lora:
        known, now = (f"LoRA ({x})" if x is not None else "no LoRA" for x in (before, lora))
        raise ConfigError(
            f"{resume_from} was trained with {known}, but now with {now}; give the same "
            "--lora_rank, --lora_alpha and --lora_targets, or start a new --log_dir from it with "
            "--model_path."
        )


def open_split(config: DataConfig, split: str) -> TokenDataset:
    """One split of the data set.

    Raises:
        DatasetError: the data is missing, damaged, or needs more settings to be read.
    """
    shape = None if config.latent_shape is None else parse_latent_shape(config.latent_shape)
    return TokenDataset(
        config.sources.paths,
        split,
        config.split_string,
        config.seed,
        latent_shape=shape,
        vocab_size=config.vocab_size,
    )


def training_order(config: DataConfig, train_data: TokenDataset) -> Order:
    """The order in which the clips of the training split come.

    Raises:
        DatasetError: a data set has no clip there.
    """
    limit = config.clips_per_video_per_epoch
    return make_order(
        train_data.set_numbers(),
        None if limit is None else train_data.source_numbers(),
        config.sources.weights,
        limit,
        config.seed,
    )


def _open_validation(config: TrainConfig, train_data: TokenDataset) -> TokenDataset | None:
    """The validation split; None where validation is off or no clip falls in it.

    Raises:
        ConfigError: the best checkpoints are to be kept, but nothing is validated.
    """
    split = None
    if parse_split_string(config.data.split_string)[1] > 0 and config.limit_val_batches > 0:
        split = train_data.other_split("validation")
    if split is not None and len(split):
        # A validation may be shorter than the split, and is to be of all data sets.
        return split.shuffled(config.data.seed) if len(config.data.sources.paths) > 1 else split
    if config.save_top_k is not None and config.save_top_k > 0:
        raise ConfigError(
            f"--save_top_k {config.save_top_k} keeps the checkpoints of lowest validation loss, "
            "but validation is off here; give --split_string and --limit_val_batches for it, or "
            "--keep_last_n instead."
        )
    return None


def describe(dataset: TokenDataset, config: DataConfig) -> TrainingData:
    """What a checkpoint records of its data, and what a resumed run must find again."""
    contract = None if dataset.manifest is None else dataset.manifest.contract
    split = SplitInfo(config.split_string, config.seed)
    weights, limit = config.sources.weights, config.clips_per_video_per_epoch
    sampling = None
    if weights is not None or limit is not None:
        sampling = SamplingInfo(dataset.fingerprints, weights, limit)
    return TrainingData(contract, dataset.fingerprint, split, sampling)


def _plan_transfer(
    config: TrainConfig, source: CheckpointSource, train_data: TokenDataset, folder: RunFolder
) -> Transfer | None:
    """Other rows for the new tokens; None keeps the checkpoint's."""
    settings = config.model
    if settings.embedding_init == "keep":
        return None
    contract = folder.data.contract
    transfer = plan_transfer(
        source,
        settings.embedding_init,
        train_data.vocab_size,
        None if contract is None else contract.tokenizer,
        settings.cooccurrence_path,
        settings.seed,
    )
    folder.record_transfer(transfer.describe())
    return transfer


def _describe_start(
    config: TrainConfig, source: CheckpointSource, folder: RunFolder, transfer: Transfer | None
) -> dict[str, Any]:
    """What the run's checkpoints record of the model that it begins with."""
    described: dict[str, Any] = {"model_path": config.model.path}
    if source.path is not None:
        described["checkpoint"] = str(source.path)
    if source.contract is not None:
        described["tokenizer"] = to_plain(source.contract.tokenizer)
    contract = folder.data.contract
    tokenizer = None if contract is None else contract.tokenizer
    if advised := advice.sentence(source, tokenizer, transfer):
        described["embedding_start"] = advised
    return described


def announce(config: TrainConfig, inputs: Inputs, dtype: torch.dtype) -> None:
    """Says what is about to run."""
    sizes, data, say = inputs.parallelism, inputs.train_data, launch.say
    if inputs.order.num_samples != len(data) or config.data.sources.weights is not None:
        say(f"an epoch is {inputs.order.num_samples} samples of {config.data.sources}")
    model = inputs.model_config
    trained = ""
    if model.lora is not None:
        trained = f" ({num_trained_parameters(model) / 1e6:,.1f}M trained: LoRA of {model.lora})"
    count = sizes.virtual_pipeline
    chunks = f" (interleaved, {count} parts each)" if count > 1 else ""
    say(
        f"{model.num_parameters / 1e6:,.1f}M parameters{trained}, {len(data)} training clips "
        f"of {data.seq_length} tokens {tuple(data.latent_shape)}, TP {sizes.tensor} PP "
        f"{sizes.pipeline}{chunks} CP {sizes.context} DP "
        f"{parallel_state.get_data_parallel_world_size()}, {dtype}"
    )
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    if config.parallel.overlap_param_gather and ranks == 1:
        say("note: --overlap_param_gather changes nothing with one data-parallel process.")
    if config.optimizer.min_lr is not None and config.optimizer.lr_decay_style == "constant":
        say("note: --min_lr changes nothing with --lr_decay_style constant.")
    if config.val_check_interval is not None and inputs.val_data is None:
        is_off = config.limit_val_batches == 0
        why = "--limit_val_batches is 0" if is_off else "no clip falls in the validation split"
        say(f"note: --val_check_interval {config.val_check_interval} changes nothing: {why}.")
    heads.announce(config, inputs.source, inputs.transfer is not None)
    contract = inputs.folder.data.contract
    tokenizer = None if contract is None else contract.tokenizer
    if inputs.resume_from is not None:
        say(f"resuming {inputs.resume_from}")
    else:
        known = inputs.source.contract
        if (
            known is not None
            and tokenizer is not None
            and known.tokenizer.sha256 != tokenizer.sha256
        ):
            say(f"tokenizer swap: the model saw {known.tokenizer.id}, the data is {tokenizer.id}")
        if advised := advice.sentence(inputs.source, tokenizer, inputs.transfer):
            say(advised)
    steps = math.ceil(config.max_epochs * inputs.order.num_samples / config.global_batch_size)
    if steps < config.max_steps:
        say(
            f"note: --max_epochs {config.max_epochs} would end after {steps} steps; "
            f"--max_steps {config.max_steps} decides and the data repeats."
        )
