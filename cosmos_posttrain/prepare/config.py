"""What a preparation is: its settings, flags and checks. No torch.

Flows in: defaults < YAML < flags < overrides (``cli.py``). Flows out: a ``PrepareConfig``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.data.contract import TEXT_DTYPES
from cosmos_posttrain.errors import ConfigError, GeometryError
from cosmos_posttrain.geometry import ClipGeometry, parse_compression
from cosmos_posttrain.launch import DTYPES
from cosmos_posttrain.prepare.sources import parse_clips_per_video
from cosmos_posttrain.text.shipped import TEXT_ENCODER_DTYPES


@dataclass
class PrepareConfig:
    """Settings of ``prepare_dataset.py``.

    Attributes:
        input_videos_dir: folder of videos, searched recursively; or give one of the next three.
        input_jsonl: file with ``{"visual_input": path, "prompt": text}`` a line.
        input_pt_dir: folder of ``.pt`` files that the original recipe wrote for Video2World models;
            ``encoder_path`` and ``text_encoder_path`` name what made them.
        input_tokens_dir: folder of the 1X World Model Challenge (v2.0 or v1.1), whose tokens are
            imported as they are.
        output_prefix: folder for the shards and the manifest.
        width: pixels of a clip, a multiple of the tokenizer's.
        height: pixels of a clip, a multiple of the tokenizer's.
        num_context_frames: frames of a clip, given and generated: 1 + a multiple of the
            tokenizer's.
        tokenizer_compression_factor: T,H,W: frames, rows and columns of pixels for each token.
        encoder_path: Hugging Face id, folder, ``.jit`` file, or a shipped tokenizer's name. Of
            imported tokens: what made them, to record the hash of its weights.
        decoder_path: likewise; None means the encoder's. It only has to fit.
        clips_per_video: a number of clips spread over each video, or ``all`` that fit.
        frame_stride: distance between a clip's frames, in frames of the video.
        num_workers: decoding threads of each process; does not change the result.
        batch_size: clips in one call of the encoder.
        encoder_threads: CPU threads of the encoder; fixed, because rounding depends on it.
        videos_per_shard: videos in each .bin/.idx pair; what is lost at most when a run is killed,
            for each process.
        text_encoder_path: T5 encoder of the prompts: folder, Hugging Face id, or ``tiny``; makes a
            Video2World data set. None leaves prompts as they are.
        text_encoder_dtype: to compute in; None means the weights' own on a GPU and float32 on the
            CPU.
        text_encoder_batch_size: prompts in one call of the text encoder.
        embedding_dtype: in which prompts are stored.
        seed: shuffles the videos before they are dealt to shards; None keeps them sorted.
        max_failures: unreadable videos that still give exit code 0.
        overwrite: delete an earlier data set in the output folder and start anew.
        device: of the encoder: ``auto`` (the process's GPU, else the CPU), ``cpu`` or ``cuda``.
        dtype: of the encoder; None means the weights' own on a GPU and float32 on the CPU.
    """

    input_videos_dir: str | None = None
    input_jsonl: str | None = None
    input_pt_dir: str | None = None
    input_tokens_dir: str | None = None
    output_prefix: str = ""
    width: int = setting(1024, at_least=1)
    height: int = setting(640, at_least=1)
    num_context_frames: int = setting(33, at_least=1)
    tokenizer_compression_factor: str = "8,16,16"
    encoder_path: str = "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
    decoder_path: str | None = None
    clips_per_video: str = "1"
    frame_stride: int = setting(1, at_least=1)
    num_workers: int = setting(2, at_least=1)
    batch_size: int = setting(1, at_least=1)
    encoder_threads: int = setting(1, at_least=1)
    videos_per_shard: int = setting(64, at_least=1)
    text_encoder_path: str | None = None
    text_encoder_dtype: str | None = setting(None, choices=TEXT_ENCODER_DTYPES)
    text_encoder_batch_size: int = setting(8, at_least=1)
    embedding_dtype: str = setting("bfloat16", choices=TEXT_DTYPES)
    seed: int | None = None
    max_failures: int = setting(0, at_least=0)
    overwrite: bool = False
    device: str = "auto"
    dtype: str | None = setting(None, choices=DTYPES)


FLAGS = (
    Flag("--input_videos_dir"),
    Flag("--input_jsonl"),
    Flag("--input_pt_dir"),
    Flag("--input_tokens_dir"),
    Flag("--output_prefix", aliases=("--output_dir",)),
    Flag("--width"),
    Flag("--height"),
    Flag("--num_context_frames"),
    Flag("--tokenizer_compression_factor"),
    Flag("--encoder_path"),
    Flag("--decoder_path"),
    Flag("--clips_per_video"),
    Flag("--frame_stride"),
    Flag("--num_workers"),
    Flag("--batch_size"),
    Flag("--encoder_threads"),
    Flag("--videos_per_shard"),
    Flag("--text_encoder_path"),
    Flag("--text_encoder_dtype"),
    Flag("--text_encoder_batch_size"),
    Flag("--embedding_dtype"),
    Flag("--seed"),
    Flag("--max_failures"),
    Flag("--overwrite"),
    Flag("--device"),
    Flag("--dtype"),
)


def validate(config: PrepareConfig) -> None:
    """Checks everything that needs no file, and names all problems at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
        GeometryError: the tokenizer cannot represent the clip.
    """
    problems = []
    inputs = {
        "--input_videos_dir": config.input_videos_dir,
        "--input_jsonl": config.input_jsonl,
        "--input_pt_dir": config.input_pt_dir,
        "--input_tokens_dir": config.input_tokens_dir,
    }
    if sum(value is not None for value in inputs.values()) != 1:
        problems.append(f"give one of {', '.join(inputs)}")
    if config.input_tokens_dir is not None:
        problems += _without_effect(config)
    if not config.output_prefix:
        problems.append("give --output_prefix, the folder for the tokens")
    if config.text_encoder_path is not None and config.input_videos_dir is not None:
        problems.append("--text_encoder_path needs --input_jsonl, whose lines have the prompts")
    if config.text_encoder_path is None and config.input_pt_dir is not None:
        problems.append(
            "--input_pt_dir needs --text_encoder_path: name the text encoder that made its prompts"
        )
    for parse, value in (
        (parse_clips_per_video, config.clips_per_video),
        (parse_compression, config.tokenizer_compression_factor),
    ):
        try:
            parse(value)
        except (ConfigError, GeometryError) as error:
            problems.append(str(error).rstrip("."))
    check(config, flag_names(FLAGS), problems)
    geometry(config)


def _without_effect(config: PrepareConfig) -> list[str]:
    """Settings of clips that imported tokens do not have."""
    kept = "input_tokens_dir output_prefix encoder_path decoder_path overwrite device".split()
    names = flag_names(FLAGS)
    changed = [
        names[field.name]
        for field in dataclasses.fields(config)
        if field.name not in kept and getattr(config, field.name) != field.default
    ]
    if not changed:
        return []
    what = "has" if len(changed) == 1 else "have"
    return [f"{', '.join(changed)} {what} no effect on --input_tokens_dir: leave it out"]


def geometry(config: PrepareConfig) -> ClipGeometry:
    """The clip before and after the tokenizer.

    Raises:
        GeometryError: the tokenizer cannot represent it.
    """
    compression = parse_compression(config.tokenizer_compression_factor)
    return ClipGeometry(config.num_context_frames, config.height, config.width, compression)
