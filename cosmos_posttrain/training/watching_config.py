"""What of a run is looked at besides its numbers: sample clips and profiled steps. No torch.

Flows in: a run's settings. Flows out: what is wrong with them, in words.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cosmos_posttrain.cli import Flag
from cosmos_posttrain.config import setting

# A trace of a step of a large model is tens of MB.
MAX_PROFILED_STEPS = 50
_MAX_CLIPS = 16  # each is generated token by token


@dataclass
class SamplesConfig:
    """Clips that a run continues now and then, to be looked at.

    Attributes:
        every_n_steps: optimizer steps between samples, which are also made after the last one; None
            makes none: generation takes the time of many steps.
        num_clips: clips of the validation split to continue, the first ones; of the training split
            where validation is off.
        tokenizer_path: the data's tokenizer, which makes films of tokens; None is the one that the
            data set names.
        videos_dir: folder of the source videos, to show them beside what was generated; None shows
            the tokenizer's reconstructions only.
    """

    every_n_steps: int | None = setting(None, at_least=1)
    num_clips: int = setting(2, at_least=1, at_most=_MAX_CLIPS)
    tokenizer_path: str | None = None
    videos_dir: str | None = None


SAMPLES_FLAGS = (
    Flag("--sample_every_n_steps", "samples.every_n_steps"),
    Flag("--num_sample_clips", "samples.num_clips"),
    Flag("--sample_tokenizer_path", "samples.tokenizer_path"),
    Flag("--sample_videos_dir", "samples.videos_dir"),
)


def samples_problems(
    samples: SamplesConfig, pipeline_parallel_size: int, context_parallel_size: int
) -> list[str]:
    """What keeps a run from making samples, or from what it says of them."""
    if samples.every_n_steps is None:
        flags = {
            "--num_sample_clips": "num_clips",
            "--sample_tokenizer_path": "tokenizer_path",
            "--sample_videos_dir": "videos_dir",
        }
        return [
            f"{flag} has no effect without --sample_every_n_steps"
            for flag, name in flags.items()
            if getattr(samples, name) != getattr(SamplesConfig, name)
        ]
    sizes = {
        "--pipeline_model_parallel_size": pipeline_parallel_size,
        "--context_parallel_size": context_parallel_size,
    }
    return [
        f"--sample_every_n_steps generates with the model as it is trained, which {flag} {size} "
        "cannot: leave samples out, and run evaluate.py generate on the checkpoints"
        for flag, size in sizes.items()
        if size > 1
    ]


def retention_problems(
    save_top_k: int | None, keep_last_n: int | None, save_every: int, validate_every: int | None
) -> list[str]:
    """What keeps a run from keeping the checkpoints that it is asked to keep.

    Args:
        save_top_k: the best this many; None where nobody asked.
        keep_last_n: the newest this many; None where nobody asked.
        save_every: steps between checkpoints.
        validate_every: steps between validations; None means at every checkpoint.
    """
    if save_top_k == 0:
        return ["--save_top_k 0 must be at least 1, or -1 for all"]
    if save_top_k == -1 and keep_last_n is not None:
        return [f"--keep_last_n {keep_last_n} has no effect with --save_top_k -1, which keeps all"]
    if save_top_k in (None, -1) or not validate_every or save_every % validate_every == 0:
        return []
    return [
        f"--save_top_k {save_top_k} would remove checkpoints without a validation loss: "
        f"--save_every_n_steps {save_every} must be a multiple of --val_check_interval "
        f"{validate_every}"
    ]


def parse_profile_steps(text: str) -> range:
    """``10-12`` -> steps 10, 11 and 12, counted from 0 as in metrics.jsonl; ``10`` is one step.

    Raises:
        ValueError: it is something else; says what.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if match is None:
        raise ValueError("must be two steps, such as 10-12")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError("ends before it begins")
    if last - first >= MAX_PROFILED_STEPS:
        raise ValueError(
            f"are {last - first + 1} steps, and a trace of each is large: give at most "
            f"{MAX_PROFILED_STEPS}"
        )
    return range(first, last + 1)


def profile_problems(text: str | None, max_steps: int) -> list[str]:
    """What is wrong with the steps to profile."""
    if text is None:
        return []
    try:
        steps = parse_profile_steps(text)
    except ValueError as error:
        return [f"--profile_steps {text} {error}"]
    if steps[-1] >= max_steps:
        return [
            f"--profile_steps {text} must end before --max_steps {max_steps}: steps count from 0"
        ]
    return []
