"""What a run of ``infer.py`` makes clips of, and what their files are called.

Flows in: an ``InferConfig``, and the folder of tokens where it names one. Flows out: ``Item``s. A
jsonl, a folder, a single file and a folder of tokens are all lists of inputs; the number of an
input in its list is what its random numbers depend on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from cosmos_posttrain import files
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import ClipGeometry
from cosmos_posttrain.inference.config import InferConfig
from cosmos_posttrain.inference.input_lists import (
    BatchLine,
    output_names,
    read_batch,
    read_folder,
)
from cosmos_posttrain.inference.outputs import EXTRAS, Item, single_output
from cosmos_posttrain.inference.request import DEFAULT_INPUT_FRAMES, Request
from cosmos_posttrain.inference.token_inputs import TokenFolder
from cosmos_posttrain.video import is_image, probe

# Every item costs a line of memory and a look for its files.
_MAX_ITEMS = 100_000


def make_items(config: InferConfig, tokens: TokenFolder | None) -> list[Item]:
    """The clips that a config asks for, in order; writes nothing.

    Args:
        config: what is asked for.
        tokens: the folder of ``input_tokens_dir``, opened.

    Raises:
        ConfigError: inputs that do not exist, do not fit ``--input_type``, or would be overwritten.
        VideoError: a single input that cannot be decoded.
        OutputFolderError: the folder of the outputs cannot be written to.
    """
    items = list(_items(config, tokens))
    if len(items) > _MAX_ITEMS:
        raise ConfigError(
            f"the run would make {len(items):,} clips; make at most {_MAX_ITEMS:,} at a time "
            "(--max_clips, or a shorter list)."
        )
    _check_apart(items)
    _check_inputs_survive(items)
    files.check_writable(items[0].video.parent)
    return items


def _items(config: InferConfig, tokens: TokenFolder | None) -> Iterator[Item]:
    if tokens is not None:
        single = single_output(config.video_save_name, config.video_save_folder)
        for number in _numbers(config, tokens.num_clips):
            yield from _token_items(config, tokens, number, single)
        return
    lines = _lines(config)
    if config.batch_input_path is None:
        stem = single_output(config.video_save_name, config.video_save_folder)
        numbers, videos = [config.item or 0], [stem]
    else:
        numbers = _numbers(config, len(lines))
        folder = Path(config.video_save_folder)
        videos = [folder / f"{name}.mp4" for name in output_names(lines)]
        lines, videos = [lines[n] for n in numbers], [videos[n] for n in numbers]
    for number, line, video in zip(numbers, lines, videos, strict=True):
        yield from _path_items(config, number, line, video)


def _numbers(config: InferConfig, count: int) -> list[int]:
    """Of a list of so many, the inputs that are asked for."""
    if config.item is not None:
        if config.item >= count:
            raise ConfigError(
                f"--item {config.item} is not in the list, which has {count} inputs; they are "
                "counted from 0."
            )
        return [config.item]
    wanted = min(config.max_clips or count, count)
    if wanted > _MAX_ITEMS:
        raise ConfigError(
            f"{count:,} clips are more than a run makes; give --max_clips of at most "
            f"{_MAX_ITEMS:,}."
        )
    if not count:
        raise ConfigError("there is no clip in that folder; name another.")
    return [int(number) for number in np.arange(wanted) * count // wanted]


def _lines(config: InferConfig) -> list[BatchLine]:
    """The list of images and videos."""
    if config.batch_input_path is None:
        assert config.input_image_or_video_path is not None
        path = Path(config.input_image_or_video_path)
        probe(path)
        lines = [BatchLine(path, config.prompt)]
    elif Path(config.batch_input_path).is_dir():
        lines = read_folder(config.batch_input_path, config.video_save_folder, config.prompt)
    else:
        lines = read_batch(config.batch_input_path)
    for line in lines if config.input_type in ("video", "text_and_video") else ():
        if is_image(line.path):
            wanted = str(config.input_type).replace("video", "image")
            raise ConfigError(f"{line.path} is an image; give --input_type {wanted}.")
    return lines


def _path_items(config: InferConfig, number: int, line: BatchLine, video: Path) -> Iterator[Item]:
    if config.side_by_side and is_image(line.path):
        raise ConfigError(
            f"{line.path} is an image, which has no truth to compare with; leave out "
            "--side_by_side."
        )
    for sample in config.samples:
        make = partial(
            _request,
            config,
            number,
            sample,
            path=line.path,
            prompt=None if config.is_plain else line.prompt,
            num_input_frames=1 if config.takes_images else config.num_input_frames,
        )
        name = _of_sample(video, sample)
        yield Item(make, name, line.where, line.path, extras=_extras(config))


def _token_items(
    config: InferConfig, tokens: TokenFolder, number: int, single: Path
) -> Iterator[Item]:
    num_given = config.num_input_frames or DEFAULT_INPUT_FRAMES
    given = _num_given_latents(tokens.geometry, num_given)

    def true_tokens() -> Tensor:
        return tokens.read(number).tokens

    for sample in config.samples:

        def make(sample: int = sample) -> Request:
            clip = tokens.read(number)
            text = {"prompt": config.prompt, "context": None if config.prompt else clip.text}
            request = _request(config, number, sample, tokens=clip.tokens[:given], **text)
            return request if config.fps else dataclasses.replace(request, fps=clip.fps)

        video = single.with_name(f"{single.stem}_{number:05d}.mp4")
        where = f"clip {number} of {tokens.path}"
        yield Item(
            make, _of_sample(video, sample), where, true_tokens=true_tokens, extras=_extras(config)
        )


def _num_given_latents(geometry: ClipGeometry, num_frames: int) -> int:
    return geometry.num_condition_tokens(num_frames) // geometry.latent_shape.tokens_per_frame


def _request(config: InferConfig, item: int, sample: int, **given: Any) -> Request:
    return Request(
        negative_prompt=config.negative_prompt,
        guidance_scale=config.guidance_scale,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=config.seed,
        item=item,
        sample=sample,
        num_rollout_chunks=config.num_rollout_chunks,
        rollout_overlap=config.rollout_overlap,
        rollout_anchor=config.rollout_anchor,
        with_log_probs=config.save_log_probs,
        fps=config.fps,
        **given,
    )


def _extras(config: InferConfig) -> tuple[str, ...]:
    return tuple(name for name in EXTRAS if getattr(config, name))


def _of_sample(video: Path, sample: int) -> Path:
    """The first sample has the input's name, so that asking for more of them keeps it."""
    return video.with_name(f"{video.stem}_sample_{sample}.mp4") if sample else video


# Files.


def _check_apart(items: Sequence[Item]) -> None:
    taken: set[Path] = set()
    for item in items:
        for path in item.files:
            if path in taken:
                raise ConfigError(f"two clips would be written to {path}; rename an input.")
            taken.add(path)


def _check_inputs_survive(items: Sequence[Item]) -> None:
    """Refuses outputs that would replace inputs."""
    inputs = {item.path.resolve() for item in items if item.path is not None}
    for item in items if inputs else ():
        for output in item.files:
            if output.resolve() in inputs:
                raise ConfigError(
                    f"{output} is an input and would be replaced by an output; choose another "
                    "--video_save_folder or --video_save_name."
                )
