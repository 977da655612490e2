"""What ``evaluate.py loss`` scores: data and model, opened and held against one another.

Flows in: a ``LossEvalConfig``. Flows out: ``LossInputs``; everything that can be refused is refused
before weights are read or anything is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint.context import SplitInfo
from cosmos_posttrain.checkpoint.source import CheckpointSource, open_source
from cosmos_posttrain.data.batch import SequenceLayout
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.paths import parse_data_path
from cosmos_posttrain.data.serial import to_plain
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import ConfigError, DatasetError, GeometryError, TokenizerError
from cosmos_posttrain.evaluation.config.loss import LossEvalConfig
from cosmos_posttrain.geometry import parse_latent_shape
from cosmos_posttrain.inference.opening import look_up
from cosmos_posttrain.models.builder import CosmosGPTModel, build_model
from cosmos_posttrain.models.sequence import sequence_layout
from cosmos_posttrain.training import texts
from cosmos_posttrain.training.building import check_division

_DEFAULT_SPLIT = SplitInfo("98,1,1", 1234)
_TRY_ANYWAY = "or try anyway with --allow_tokenizer_mismatch"


@dataclass(frozen=True)
class LossInputs:
    """Data and model that go together.

    Attributes:
        clips: the split that is scored.
        numbers: of its clips, those to score, ascending.
        source: the model, at the data's grid.
        layout: of its sequences.
        parallelism: sizes of the parallel groups.
        split: which clips are which.
        notes: sentences for the user.
    """

    clips: TokenDataset
    numbers: list[int]
    source: CheckpointSource
    layout: SequenceLayout
    parallelism: groups.Parallelism
    split: SplitInfo
    notes: tuple[str, ...]

    @property
    def num_given(self) -> int:
        """First tokens of a clip that are not predicted."""
        return max(self.layout.num_given, 1 - len(self.layout.prefix))

    def build(self, config: LossEvalConfig) -> CosmosGPTModel:
        """This rank's part of the model, with its weights.

        Raises:
            CheckpointError: the weights are damaged or do not fit.
        """
        groups.initialize(self.parallelism)
        module = build_model(
            self.source.config,
            dtype=launch.parse_dtype(config.dtype),
            layer_spec=config.layer_spec,
            sequence_parallel=config.sequence_parallel,
            calculate_per_token_loss=True,
        )
        self.source.load_weights(module)
        return module

    def settings(self, config: LossEvalConfig) -> dict[str, Any]:
        """All that decides the figures; another number of processes only rounds otherwise."""
        manifest, path = self.clips.manifest, self.source.path
        model = str(path.resolve()) if path else config.ar_model_dir
        return {
            "command": "loss",
            "model": model,
            "num_parameters": self.source.config.num_parameters,
            "is_video2world": self.source.config.is_video2world,
            "dataset": self.clips.fingerprint,
            "tokenizer": to_plain(manifest.contract.tokenizer) if manifest else None,
            "latent_shape": list(self.clips.latent_shape),
            "vocab_size": self.clips.vocab_size,
            "split": config.split,
            "split_string": self.split.split_string,
            "seed": self.split.seed,
            "num_clips_of_split": len(self.clips),
            "num_clips": len(self.numbers),
            "num_given_tokens": self.num_given,
            "max_train_clips": config.max_train_clips,
            "max_pairs": config.max_pairs,
            "rope_scaling": config.rope_scaling,
            "rope_scale": config.rope_scale,
            "layer_spec": config.layer_spec,
            "dtype": config.dtype,
            "device": launch.device().type,
        }


def open_inputs(config: LossEvalConfig) -> LossInputs:
    """Opens everything and checks that it fits together.

    Raises:
        UserError: the first thing that does not fit.
    """
    source = open_source(look_up(config.ar_model_dir, config.checkpoint_dir))
    split, notes = _choose_split(config, source)
    clips = _open_split(config, split)
    contract = None if clips.manifest is None else clips.manifest.contract
    if not config.allow_tokenizer_mismatch:
        _check_contract(source.contract, contract)
    trained = source.config.latent_shape
    source = _at_data(config, source, clips)
    if not source.is_fresh and trained != clips.latent_shape:
        notes.append(
            f"the model's own grid is {tuple(trained)}, the data's is {tuple(clips.latent_shape)}"
        )
    if source.data is not None and source.data.dataset not in (None, clips.fingerprint):
        notes.append(
            "the model was trained on another data set than this; nothing says which of these "
            "clips it has seen"
        )
    num_given = _num_given_latents(config, source)
    if num_given >= clips.latent_shape.time:
        raise ConfigError(
            f"--num_condition_latents {num_given} leaves nothing to predict of clips of "
            f"{clips.latent_shape.time} latent frames; give fewer."
        )
    sizes = groups.Parallelism(
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.context_parallel_size,
    )
    check_division(source.config, sizes, config.sequence_parallel)
    size = min(len(clips), config.max_clips or len(clips))
    numbers = [number * len(clips) // size for number in range(size)]
    layout = sequence_layout(source.config, num_given)
    return LossInputs(clips, numbers, source, layout, sizes, split, tuple(notes))


def _choose_split(config: LossEvalConfig, source: CheckpointSource) -> tuple[SplitInfo, list[str]]:
    """As given, else that of the checkpoint's own run, under which held-out means held-out."""
    recorded = None if source.data is None else source.data.split
    usual = recorded or _DEFAULT_SPLIT
    split = SplitInfo(
        usual.split_string if config.split_string is None else config.split_string,
        usual.seed if config.seed is None else config.seed,
    )
    if recorded is not None and split != recorded and config.split != "train":
        return split, [
            f"the model was trained with --split_string {recorded.split_string} and --seed "
            f"{recorded.seed}: it may have seen clips of this {config.split} split"
        ]
    return split, []


def _open_split(config: LossEvalConfig, split: SplitInfo) -> TokenDataset:
    shape = None if config.latent_shape is None else parse_latent_shape(config.latent_shape)
    clips = TokenDataset(
        parse_data_path(config.data_path).paths,  # the splits of several are not those of each
        config.split,
        split.split_string,
        split.seed,
        latent_shape=shape,
        vocab_size=config.vocab_size,
    )
    if not len(clips):
        raise DatasetError(
            f"the {config.split} split of {config.data_path} (--split_string "
            f"{split.split_string}) holds no clip; give another --split, or a --split_string with "
            "a share for it and at least three source videos."
        )
    clips.latent_shape  # noqa: B018  data without a manifest and a shape is refused here
    return clips


def _check_contract(model: Contract | None, data: Contract | None) -> None:
    """Refuses tokens of another tokenizer, and clips of another size, than the model's.

    Raises:
        TokenizerError: names both tokenizers.
        GeometryError: names both sizes.
    """
    if model is None or data is None:
        return
    ours, theirs = model.tokenizer, data.tokenizer
    if (ours.sha256, tuple(ours.levels)) != (theirs.sha256, tuple(theirs.levels)):
        raise TokenizerError(
            f"the model was trained on tokens of {ours.id} (sha256 {ours.sha256[:12]}), but the "
            f"data set holds tokens of {theirs.id} (sha256 {theirs.sha256[:12]}); prepare it with "
            f"the model's tokenizer, {_TRY_ANYWAY}."
        )
    if model.clip != data.clip:
        sizes = [f"{c.num_frames} frames of {c.width}x{c.height}" for c in (model.clip, data.clip)]
        raise GeometryError(
            f"the model was trained on clips of {sizes[0]}, but the data set holds clips of "
            f"{sizes[1]}; prepare them in the model's size, {_TRY_ANYWAY}."
        )


def _at_data(
    config: LossEvalConfig, source: CheckpointSource, clips: TokenDataset
) -> CheckpointSource:
    """The model at the data's grid, for its vocabulary and its texts."""
    source = source.at_grid(
        clips.latent_shape, config.rope_scaling, config.rope_scale, clips.vocab_size
    )
    if source.config.vocab_size != clips.vocab_size:
        raise TokenizerError(
            f"the model predicts {source.config.vocab_size} tokens but the data set has a "
            f"vocabulary of {clips.vocab_size}; give data of the model's tokenizer, or post-train "
            "the model on this one first."
        )
    has_text = clips.manifest is not None and clips.manifest.contract.text_encoder is not None
    if source.config.is_video2world != has_text:
        kinds = ("no text", "a text")
        raise ConfigError(
            f"the model takes {kinds[source.config.is_video2world]}, but the data set's clips have "
            f"{kinds[has_text]}; give a model and data that go together."
        )
    return texts.checked_source(source, clips)


def _num_given_latents(config: LossEvalConfig, source: CheckpointSource) -> int:
    """As given, else as the checkpoint's run had it, whose validation loss this is then."""
    if config.num_condition_latents is not None:
        return config.num_condition_latents
    path = None if source.path is None else Path(source.path) / "context" / "config.yaml"
    if path is None or not path.is_file():
        return 0
    try:
        recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
        return int(recorded["num_condition_latents"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return 0


def read_clips(clips: TokenDataset, numbers: list[int]) -> tuple[list[Any], list[str | None]]:
    """Tokens (N,) int64 and texts of some clips; zeros, and the reason, where one is unreadable."""
    found: list[tuple[torch.Tensor, torch.Tensor | None] | None] = []
    errors: list[str | None] = []
    for number in numbers:
        try:
            found.append((clips[number], clips.context(number)))
            errors.append(None)
        except DatasetError as error:
            found.append(None)
            errors.append(str(error))
    contract = None if clips.manifest is None else clips.manifest.contract
    text = None
    if contract is not None and contract.text_encoder is not None:
        assert contract.context_len is not None
        text = torch.zeros(contract.context_len, contract.text_encoder.width)
    nothing = (torch.zeros(clips.seq_length, dtype=torch.int64), text)
    return [nothing if item is None else item for item in found], errors
