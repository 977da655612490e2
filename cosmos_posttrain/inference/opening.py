"""Which model, tokenizers and clip a config means: what is not given follows from the checkpoint.

Flows in: a ``SessionConfig``. Flows out: an opened checkpoint, a tokenizer and a text encoder to
load, and the clip's geometry. Of the model only configs are read; nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain import hub, launch
from cosmos_posttrain.checkpoint.source import CheckpointSource, open_source
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.geometry import (
    ClipGeometry,
    Compression,
    num_pixel_frames,
    parse_compression,
)
from cosmos_posttrain.inference import contract as contracts
from cosmos_posttrain.inference.conditioning import TextEncoderChoice
from cosmos_posttrain.inference.config import SessionConfig
from cosmos_posttrain.models.presets import PRESETS
from cosmos_posttrain.text import DEFAULT_TEXT_ENCODER
from cosmos_posttrain.tokenizer.loading import check_recorded, load_tokenizer_pair
from cosmos_posttrain.tokenizer.video_tokenizer import VideoTokenizer

_PUBLISHED_TOKENIZER = "Cosmos-1.0-Tokenizer-DV8x16x16"


@dataclass(frozen=True)
class TokenizerChoice:
    """Which tokenizer a session loads, at the start and again after it was freed.

    Attributes:
        encoder_path: as ``load_tokenizer_pair`` takes it.
        decoder_path: likewise.
        compression: what it must have; None takes its own.
        sha256: what its encoder must have; None takes any.
    """

    encoder_path: str
    decoder_path: str
    compression: Compression | None
    sha256: str | None

    def load(self) -> VideoTokenizer:
        """Reads the weights, onto this process's device."""
        return load_tokenizer_pair(
            self.encoder_path,
            self.decoder_path,
            self.compression,
            launch.device(),
            expected_sha256=self.sha256,
        )


def look_up(path: str, checkpoint_dir: str) -> str:
    """A bare name that is not here but lies in the checkpoint folder is the one there."""
    candidate = Path(checkpoint_dir) / path
    return str(candidate) if not Path(path).exists() and candidate.exists() else path


def open_checkpoint(config: SessionConfig) -> CheckpointSource:
    """The model, at its own grid; its configs are read, its weights are not.

    Raises:
        CheckpointError: there is no model.
    """
    return open_source(look_up(config.ar_model_dir, config.checkpoint_dir))


def tensor_size(config: SessionConfig, source: CheckpointSource) -> int:
    """Processes that share the model.

    Raises:
        ConfigError: a size that divides neither the model nor the processes that were started.
    """
    size = config.tensor_model_parallel_size
    if size is None:
        size = launch.world_size()
    source.config.check_tensor_parallel(size)
    groups.check_world(groups.Parallelism(tensor=size))
    return size


def choose_tokenizer(config: SessionConfig, contract: Contract | None) -> TokenizerChoice:
    """As given, else the checkpoint's, else the published one of the base models.

    Raises:
        TokenizerError: another compression was asked for than the checkpoint's, or the checkpoint
            names a tokenizer that could run code.
    """
    compression, sha256 = _compression(config, contract), None
    if config.encoder_path is not None:
        encoder = look_up(config.encoder_path, config.checkpoint_dir)
    elif contract is not None:
        encoder = contract.tokenizer.id
        check_recorded(encoder)
        sha256 = None if config.allow_tokenizer_mismatch else contract.tokenizer.sha256 or None
    else:
        local = Path(config.checkpoint_dir) / _PUBLISHED_TOKENIZER
        encoder = str(local) if local.is_dir() else f"nvidia/{_PUBLISHED_TOKENIZER}"
    decoder = encoder
    if config.decoder_path is not None:
        decoder = look_up(config.decoder_path, config.checkpoint_dir)
    return TokenizerChoice(encoder, decoder, compression, sha256)


def _compression(config: SessionConfig, contract: Contract | None) -> Compression | None:
    binding = None if config.allow_tokenizer_mismatch else contract
    if config.tokenizer_compression_factor is not None:
        asked = parse_compression(config.tokenizer_compression_factor)
        if binding is not None:
            contracts.check_compression(binding, asked)
        return asked
    return None if binding is None else Compression(*binding.tokenizer.compression)


def choose_text_encoder(config: SessionConfig, source: CheckpointSource) -> TextEncoderChoice:
    """As given, else the checkpoint's, else the published one where its size is the model's."""
    contract, model = source.contract, source.config
    trained = None if contract is None else contract.text_encoder
    published = PRESETS["5B-Video2World"]
    path, is_recorded = None, False
    if config.text_encoder_path is not None:
        path = look_up(config.text_encoder_path, config.checkpoint_dir)
    elif trained is not None:
        path, is_recorded = trained.id, True
    elif (model.context_len, model.context_dim) == (published.context_len, published.context_dim):
        local = Path(config.checkpoint_dir) / hub.split_revision(DEFAULT_TEXT_ENCODER)[0]
        path = str(local) if local.is_dir() else DEFAULT_TEXT_ENCODER
    assert model.context_dim is not None
    return TextEncoderChoice(
        path,
        is_recorded,
        None if config.allow_tokenizer_mismatch else trained,
        config.text_encoder_dtype,
        None if trained is None else trained.dtype,
        model.context_len,
        model.context_dim,
    )


def choose_geometry(
    config: SessionConfig,
    source: CheckpointSource,
    contract: Contract | None,
    compression: Compression,
) -> ClipGeometry:
    """The clip's size: as given, else the checkpoint's, else what the model's grid stands for.

    Raises:
        GeometryError: a size that the tokenizer cannot represent, or another than the checkpoint's.
    """
    time, rows, columns = source.config.latent_shape
    sizes = (
        num_pixel_frames(time, compression),
        rows * compression.height,
        columns * compression.width,
    )
    if contract is not None:
        sizes = (contract.clip.num_frames, contract.clip.height, contract.clip.width)
    asked = (config.num_context_frames, config.height, config.width)
    chosen = [own if given is None else given for given, own in zip(asked, sizes, strict=True)]
    geometry = ClipGeometry(chosen[0], chosen[1], chosen[2], compression)
    if contract is not None and not config.allow_tokenizer_mismatch:
        contracts.check_geometry(contract, geometry)
    return geometry


def notes(source: CheckpointSource, geometry: ClipGeometry) -> tuple[str, ...]:
    """Sentences for the user: the clip's grid is not the model's own."""
    own, used = tuple(source.config.latent_shape), tuple(geometry.latent_shape)
    if source.is_fresh or own == used:
        return ()
    return (
        f"the model's own grid is {own}, this run's is {used}; positions follow the run's, but "
        "quality is best at the grid that it was trained on",
    )
