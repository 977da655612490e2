"""Preparation: videos to clips to tokens to shards.

Flows in: a folder of videos (or a jsonl file) and a tokenizer. Flows out: a prepared folder.

    sources --decode threads--> clips (3, T, H, W) uint8 --tokenizer--> (t, h, w) int32 --> shards

A shard is a fixed list of videos, whatever the number of ranks and workers; ranks take shards in
turn (see ``encoding.py``). A killed run is continued by the same command (see ``folder.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_posttrain import launch
from cosmos_posttrain.cli import Flag
from cosmos_posttrain.errors import ConfigError, PartialFailureError, TokenizerError
from cosmos_posttrain.geometry import ClipGeometry, Compression, parse_compression

if TYPE_CHECKING:
    from cosmos_posttrain.data.contract import Contract
    from cosmos_posttrain.data.manifest import Manifest
    from cosmos_posttrain.prepare.encoding import Encoder
    from cosmos_posttrain.prepare.sources import VideoSource


@dataclass
class PrepareConfig:
    """Settings of ``prepare_dataset.py``.

    Attributes:
        input_videos_dir: folder of videos, searched recursively; this or ``input_jsonl``.
        input_jsonl: file with ``{"visual_input": path, "prompt": text}`` a line.
        output_prefix: folder for the shards and the manifest.
        width: pixels of a clip, a multiple of the tokenizer's.
        height: pixels of a clip, a multiple of the tokenizer's.
        num_context_frames: frames of a clip, 1 + a multiple of the tokenizer's.
        tokenizer_compression_factor: T,H,W.
        encoder_path: Hugging Face id, folder, ``.jit`` file, or a shipped tokenizer's name.
        decoder_path: likewise; None means the encoder's. It only has to fit.
        clips_per_video: a number of clips spread over each video, or ``all`` that fit.
        frame_stride: distance between a clip's frames, in frames of the video.
        num_workers: decoding threads of each process; does not change the result.
        batch_size: clips in one call of the encoder.
        encoder_threads: CPU threads of the encoder; fixed, because rounding depends on it.
        videos_per_shard: what is lost at most when a run is killed, for each process.
        seed: shuffles the videos before they are dealt to shards; None keeps them sorted.
        max_failures: videos that may fail before the exit code is 1.
        overwrite: delete an earlier data set in the output folder and start anew.
        device: of the encoder; ``auto`` is the process's GPU, else the CPU.
        dtype: of the encoder; None means the weights' own on a GPU and float32 on the CPU.
    """

    input_videos_dir: str | None = None
    input_jsonl: str | None = None
    output_prefix: str = ""
    width: int = 1024
    height: int = 640
    num_context_frames: int = 33
    tokenizer_compression_factor: str = "8,16,16"
    encoder_path: str = "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
    decoder_path: str | None = None
    clips_per_video: str = "1"
    frame_stride: int = 1
    num_workers: int = 2
    batch_size: int = 1
    encoder_threads: int = 1
    videos_per_shard: int = 64
    seed: int | None = None
    max_failures: int = 0
    overwrite: bool = False
    device: str = "auto"
    dtype: str | None = None

    def validate(self) -> ClipGeometry:
        """Checks everything that needs no file, and names all problems at once.

        Raises:
            ConfigError: the problems, in one sentence.
            GeometryError: the tokenizer cannot represent the clip.
        """
        from cosmos_posttrain.prepare.sources import parse_clips_per_video

        problems = []
        if (self.input_videos_dir is None) == (self.input_jsonl is None):
            problems.append("give one of --input_videos_dir and --input_jsonl")
        if not self.output_prefix:
            problems.append("give --output_prefix, the folder for the tokens")
        for name in "frame_stride num_workers batch_size encoder_threads videos_per_shard".split():
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, which must be at least 1")
        if self.max_failures < 0:
            problems.append(f"max_failures is {self.max_failures}, which must be at least 0")
        if problems:
            raise ConfigError("; ".join(problems) + ".")
        parse_clips_per_video(self.clips_per_video)
        compression = parse_compression(self.tokenizer_compression_factor)
        return ClipGeometry(self.num_context_frames, self.height, self.width, compression)


FLAGS = (
    Flag("--input_videos_dir", "input_videos_dir", "folder of videos, searched recursively"),
    Flag("--input_jsonl", "input_jsonl", "jsonl file with a visual_input (and prompt) a line"),
    Flag("--output_prefix", "output_prefix", "folder for the tokens", ("--output_dir",)),
    Flag("--width", "width", "width of a clip in pixels"),
    Flag("--height", "height", "height of a clip in pixels"),
    Flag("--num_context_frames", "num_context_frames", "frames of a clip, given and generated"),
    Flag(
        "--tokenizer_compression_factor",
        "tokenizer_compression_factor",
        "frames, rows and columns of pixels for each token",
    ),
    Flag("--encoder_path", "encoder_path", "Hugging Face id, folder, .jit file, or tiny-dv4x8x8"),
    Flag("--decoder_path", "decoder_path", "likewise (default: the encoder's)"),
    Flag("--clips_per_video", "clips_per_video", "clips spread over each video, or all that fit"),
    Flag("--frame_stride", "frame_stride", "distance between a clip's frames"),
    Flag("--num_workers", "num_workers", "decoding threads of each process"),
    Flag("--batch_size", "batch_size", "clips in one call of the encoder"),
    Flag("--encoder_threads", "encoder_threads", "CPU threads of the encoder"),
    Flag("--videos_per_shard", "videos_per_shard", "videos in each .bin/.idx pair"),
    Flag("--seed", "seed", "shuffle the videos before dealing them to shards"),
    Flag("--max_failures", "max_failures", "unreadable videos that still give exit code 0"),
    Flag("--overwrite", "overwrite", "delete an earlier data set in the output folder"),
    Flag("--device", "device", "of the encoder: auto, cpu, cuda"),
    Flag("--dtype", "dtype", "of the encoder: float32, bfloat16, float16"),
)


def prepare(config: PrepareConfig, tokenizer: Encoder | None = None) -> Manifest:
    """Prepares a data set, or continues one, or finds it complete.

    Args:
        config: the settings.
        tokenizer: used instead of loading ``encoder_path``.

    Returns:
        The manifest, on every rank.

    Raises:
        UserError: bad settings or input; nothing was written.
        PartialFailureError: more than ``max_failures`` videos could not be read; everything else
            is written and complete.
    """
    from cosmos_posttrain.data.manifest import Manifest
    from cosmos_posttrain.prepare.decoding import ClipSpec
    from cosmos_posttrain.prepare.encoding import encode_shards
    from cosmos_posttrain.prepare.folder import OutputFolder, check_writable
    from cosmos_posttrain.prepare.ranks import Ranks
    from cosmos_posttrain.prepare.sources import arrange, parse_clips_per_video

    geometry = config.validate()
    folder = Path(config.output_prefix)
    sources = arrange(_list_sources(config), config.seed)
    check_writable(folder, config.overwrite)
    encoder = tokenizer or _load_encoder(config)
    contract = _make_contract(encoder, geometry)
    step = config.videos_per_shard
    shards = [sources[i : i + step] for i in range(0, len(sources), step)]
    output = OutputFolder(folder, contract, _make_plan(config, encoder, sources), len(shards))
    spec = ClipSpec(
        geometry.num_frames,
        geometry.height,
        geometry.width,
        config.frame_stride,
        parse_clips_per_video(config.clips_per_video),
    )
    with Ranks() as ranks:
        to_do = ranks.decide(lambda: output.start(config.overwrite))
        if to_do is None:
            manifest = Manifest.load(folder)
            launch.say(
                f"{folder} is complete already: {manifest.num_documents} clips; nothing to do."
            )
        else:
            if len(to_do) < len(shards):
                launch.say(f"continuing {folder}: {len(shards) - len(to_do)} shards are done.")
            mine = {number: shards[number] for number in to_do[ranks.rank :: ranks.world_size]}
            encode_shards(mine, spec, encoder, output, config)
            manifest = ranks.decide(output.finish, gather_first=True)
            launch.say(
                f"prepared {manifest.num_documents} clips from "
                f"{len(sources) - manifest.num_failures} videos in {folder}."
            )
    _judge(manifest, len(sources), config.max_failures, folder)
    return manifest


def _list_sources(config: PrepareConfig) -> list[VideoSource]:
    from cosmos_posttrain.prepare.sources import from_folder, from_jsonl

    if config.input_videos_dir is not None:
        return from_folder(config.input_videos_dir)
    assert config.input_jsonl is not None
    return from_jsonl(config.input_jsonl)


def _load_encoder(config: PrepareConfig) -> Encoder:
    from cosmos_posttrain.tokenizer import load_tokenizer_pair

    encoder: Encoder = load_tokenizer_pair(
        config.encoder_path,
        config.decoder_path or config.encoder_path,
        config.tokenizer_compression_factor,
        config.device,
        config.dtype,
    )
    return encoder


def _make_contract(encoder: Encoder, geometry: ClipGeometry) -> Contract:
    from cosmos_posttrain.data.contract import TokenizerInfo, make_contract
    from cosmos_posttrain.data.indexed import token_dtype

    if tuple(encoder.compression) != tuple(geometry.compression):
        raise TokenizerError(
            f"the tokenizer {encoder.id} compresses by {Compression(*encoder.compression).name}, "
            f"but tokenizer_compression_factor is {geometry.compression}; make them agree."
        )
    info = TokenizerInfo(
        encoder.id,
        encoder.sha256,
        tuple(encoder.compression),
        tuple(encoder.levels),
        encoder.vocab_size,
    )
    return make_contract(info, geometry, token_dtype(encoder.vocab_size))


def _make_plan(
    config: PrepareConfig, encoder: Encoder, sources: list[VideoSource]
) -> dict[str, Any]:
    """All that decides the bytes of the result, besides the contract."""
    from cosmos_posttrain.prepare.sources import sources_sha256

    names = "clips_per_video frame_stride batch_size encoder_threads videos_per_shard seed".split()
    return {
        "num_sources": len(sources),
        "sources_sha256": sources_sha256(sources),
        **{name: getattr(config, name) for name in names},
        "encoder_device": encoder.device.type,
        "encoder_dtype": str(encoder.dtype).removeprefix("torch."),
    }


def _judge(manifest: Manifest, num_sources: int, max_failures: int, folder: Path) -> None:
    """Says which videos failed, and raises if they are too many."""
    for failure in manifest.failures[:10]:
        launch.say(f"not read: {failure.source}: {failure.reason}", error=True)
    if manifest.num_failures > max_failures:
        raise PartialFailureError(
            f"{manifest.num_failures} of {num_sources} videos could not be read, and max_failures "
            f"is {max_failures}; the others are complete in {folder}, and failures.jsonl there "
            "names each with its reason."
        )
    if manifest.num_documents == 0:
        raise PartialFailureError(f"no clip could be read, so {folder} is of no use.")
