"""Everything that can be checked before weights are loaded and process groups made.

Flows in: an ``InferConfig``. Flows out: a ``Plan`` with every default filled in from the checkpoint
and the tokenizer, or one sentence on what does not fit. Nothing is written.

Every rank makes the same plan. The tokenizer is loaded here (it is small, and its weights' hash is
what the checkpoint's contract is compared with); the model is not.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint.load import open_at_grid
from cosmos_posttrain.checkpoint.source import Source, open_source
from cosmos_posttrain.data.contract import Contract
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.files import check_writable
from cosmos_posttrain.geometry import (
    ClipGeometry,
    Compression,
    num_pixel_frames,
    parse_compression,
)
from cosmos_posttrain.inference import contract as contracts
from cosmos_posttrain.inference import outputs
from cosmos_posttrain.inference.config import InferConfig, validate
from cosmos_posttrain.inference.outputs import Item
from cosmos_posttrain.tokenizer.loading import load_tokenizer_pair
from cosmos_posttrain.tokenizer.video_tokenizer import VideoTokenizer
from cosmos_posttrain.video import is_image, probe

_PUBLISHED_TOKENIZER = "Cosmos-1.0-Tokenizer-DV8x16x16"
_DEFAULT_INPUT_FRAMES = 9


@dataclass(frozen=True)
class Plan:
    """A run of ``infer.py`` that fits together.

    Attributes:
        config: as given.
        source: the model, with the run's grid and vocabulary.
        tokenizer_paths: encoder's and decoder's.
        tokenizer: loaded.
        geometry: the whole clip.
        num_input_frames: frames that are given.
        tensor_model_parallel_size: processes that share the model.
        items: clips to generate; those that are complete already are left out.
        num_complete: clips that are there already.
        settings: what determines a clip, apart from its input.
        notes: sentences for the user.
    """

    config: InferConfig
    source: Source
    tokenizer_paths: tuple[str, str]
    tokenizer: VideoTokenizer
    geometry: ClipGeometry
    num_input_frames: int
    tensor_model_parallel_size: int
    items: tuple[Item, ...]
    num_complete: int
    settings: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def num_condition_tokens(self) -> int:
        """Tokens of the given frames."""
        return self.geometry.num_condition_tokens(self.num_input_frames)

    def settings_of(self, item: Item) -> dict[str, Any]:
        """What determines one clip."""
        return {"input": str(item.input.resolve()), **self.settings}


def _look_up(path: str, checkpoint_dir: str) -> str:
    """A bare name that is not here but lies in the checkpoint folder is the one there."""
    candidate = Path(checkpoint_dir) / path
    return str(candidate) if not Path(path).exists() and candidate.exists() else path


def _tokenizer_paths(config: InferConfig, contract: Contract | None) -> tuple[str, str]:
    encoder = config.encoder_path
    if encoder is None and contract is not None:
        encoder = contract.tokenizer.id
    if encoder is None:
        local = Path(config.checkpoint_dir) / _PUBLISHED_TOKENIZER
        encoder = str(local) if local.is_dir() else f"nvidia/{_PUBLISHED_TOKENIZER}"
    encoder = _look_up(encoder, config.checkpoint_dir)
    decoder = _look_up(config.decoder_path or encoder, config.checkpoint_dir)
    return encoder, decoder


def _compression(config: InferConfig, contract: Contract | None) -> Compression | None:
    """What the tokenizer must have; None takes its own."""
    if config.tokenizer_compression_factor is not None:
        asked = parse_compression(config.tokenizer_compression_factor)
        if contract is not None and not config.allow_tokenizer_mismatch:
            contracts.check_compression(contract, asked)
        return asked
    return (
        Compression(*contract.tokenizer.compression)
        if contract and not (config.allow_tokenizer_mismatch)
        else None
    )


def _geometry(
    config: InferConfig, source: Source, contract: Contract | None, compression: Compression
) -> ClipGeometry:
    """The clip's size: as asked for, else the checkpoint's, else what its grid stands for."""
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
    if geometry.height % 2 or geometry.width % 2:
        raise ConfigError(
            f"an mp4 needs an even width and height, not {geometry.width}x{geometry.height}."
        )
    if contract is not None and not config.allow_tokenizer_mismatch:
        contracts.check_geometry(contract, geometry)
    return geometry


def _items(config: InferConfig) -> list[Item]:
    if config.batch_input_path is not None:
        items = outputs.batch_items(config.batch_input_path, config.video_save_folder)
    else:
        assert config.input_image_or_video_path is not None
        items = [
            outputs.single_item(
                config.input_image_or_video_path, config.video_save_name, config.video_save_folder
            )
        ]
        probe(items[0].input)
    for item in items:
        if config.input_type == "video" and is_image(item.input):
            raise ConfigError(f"{item.input} is an image; add --input_type image.")
    check_writable(items[0].video.parent)
    return items


def _settings(
    config: InferConfig,
    source: Source,
    tokenizer: VideoTokenizer,
    geometry: ClipGeometry,
    num_input_frames: int,
) -> dict[str, Any]:
    return {
        "checkpoint": str(source.path.resolve()) if source.path else config.ar_model_dir,
        "tokenizer": {
            "id": tokenizer.id,
            "sha256": tokenizer.sha256,
            "compression": list(tokenizer.compression),
            "levels": list(tokenizer.levels),
            "vocab_size": tokenizer.vocab_size,
        },
        "clip": {
            "num_frames": geometry.num_frames,
            "height": geometry.height,
            "width": geometry.width,
        },
        "latent_shape": list(geometry.latent_shape),
        "rope_scaling": config.rope_scaling,
        "rope_scale": config.rope_scale,
        "num_input_frames": num_input_frames,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "top_k": config.top_k,
        "seed": config.seed,
        "fps": config.fps,
    }


def _notes(config: InferConfig, source: Source, geometry: ClipGeometry) -> list[str]:
    notes = []
    if not config.disable_diffusion_decoder:
        notes.append(
            "the diffusion decoder is not part of this package, the discrete tokenizer decodes "
            "(--disable_diffusion_decoder says so and silences this)"
        )
    own, used = tuple(source.config.latent_shape), tuple(geometry.latent_shape)
    if source.kind != "random" and own != used:
        notes.append(
            f"the model's own grid is {own}, this run's is {used}; positions follow the run's, but "
            "quality is best at the grid that it was trained on"
        )
    return notes


def _tensor_size(config: InferConfig, source: Source) -> int:
    size = config.tensor_model_parallel_size
    if size is None:
        size = launch.world_size()
    source.config.check_tensor_parallel(size)
    groups.check_world(groups.Parallelism(tensor=size))
    return size


def make_plan(config: InferConfig) -> Plan:
    """Checks everything and fills in the defaults.

    Raises:
        UserError: one of its children, for anything that does not fit.
    """
    validate(config)
    model_path = _look_up(config.ar_model_dir, config.checkpoint_dir)
    source = open_source(model_path)
    contract = contracts.read_contract(source)
    tensor_size = _tensor_size(config, source)
    items = _items(config)
    wanted = _compression(config, contract)
    if wanted is not None:  # refused before a tokenizer is downloaded
        _geometry(config, source, contract, wanted)
    paths = _tokenizer_paths(config, contract)
    tokenizer = load_tokenizer_pair(*paths, wanted, launch.device())
    geometry = _geometry(config, source, contract, tokenizer.compression)
    num_input_frames = (
        1
        if config.input_type == "image"
        else (_DEFAULT_INPUT_FRAMES if config.num_input_frames is None else config.num_input_frames)
    )
    geometry.num_condition_tokens(num_input_frames)
    if contract is not None and not config.allow_tokenizer_mismatch:
        contracts.check_tokenizer(contract, tokenizer)
    notes = _notes(config, source, geometry)
    vocab_size = tokenizer.vocab_size if source.kind == "random" else None
    source = open_at_grid(
        model_path, vocab_size, geometry.latent_shape, config.rope_scaling, config.rope_scale
    )
    contracts.check_vocabulary(source.config.vocab_size, tokenizer)
    settings = _settings(config, source, tokenizer, geometry, num_input_frames)
    plan = Plan(
        config=config,
        source=source,
        tokenizer_paths=paths,
        tokenizer=tokenizer,
        geometry=geometry,
        num_input_frames=num_input_frames,
        tensor_model_parallel_size=tensor_size,
        items=tuple(items),
        num_complete=0,
        settings=settings,
        notes=tuple(notes),
    )
    return plan if config.overwrite else _without_complete(plan)


def _without_complete(plan: Plan) -> Plan:
    left = [i for i in plan.items if not outputs.is_complete(i, plan.settings_of(i))]
    return dataclasses.replace(plan, items=tuple(left), num_complete=len(plan.items) - len(left))
