"""Settings and flags of ``evaluate.py tokenizer``. No torch.

Flows in: the command line. Flows out: a ``TokenizerEvalConfig``, field by field as it was given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain.cli import Flag
from cosmos_posttrain.errors import ConfigError

# Frames of a clip at most, where --num_frames is not given: 1 + a multiple of every published rate,
# 0.5 GB as float32 pixels at 640x1024.
DEFAULT_NUM_FRAMES = 65


@dataclass
class TokenizerEvalConfig:
    """Settings of ``evaluate.py tokenizer``.

    Attributes:
        tokenizer: Hugging Face id, folder, ``.jit`` file, or a shipped tokenizer's name.
        decoder: likewise; None means the tokenizer's own.
        videos: folder of videos and images, searched recursively; one clip of each is evaluated.
        output_dir: for ``metrics.json`` and the contact sheet; None is
            ``evaluation/tokenizer/NAME`` with the tokenizer's name.
        width: pixels of the clips, after an aspect-preserving resize and a centre crop; None keeps
            each video's own pixels, centre-cropped to whole blocks. Goes with ``height``.
        height: likewise.
        num_frames: first frames of each video, 1 + a multiple of the tokenizer's; None is 65. A
            shorter video is evaluated on as many of its frames as fit the tokenizer.
        max_videos: only the first so many, by name; None takes all.
        device: ``auto`` is CUDA where there is one, else the CPU.
        dtype: to compute in; None means the weights' own on a GPU and float32 on the CPU.
        num_threads: CPU threads; None leaves torch's number.
        batch_size: clips of equal size that are encoded and decoded together.
        max_failures: videos that may fail before the exit code is 1.
        overwrite: delete an earlier evaluation in the output folder and start anew.
    """

    tokenizer: str = ""
    decoder: str | None = None
    videos: str = ""
    output_dir: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    max_videos: int | None = None
    device: str = "auto"
    dtype: str | None = None
    num_threads: int | None = None
    batch_size: int = 1
    max_failures: int = 0
    overwrite: bool = False

    def validate(self) -> None:
        """Checks everything that needs no file, and names all problems at once.

        Raises:
            ConfigError: the problems, in one sentence.
        """
        problems = []
        if not self.tokenizer:
            problems.append("give --tokenizer, such as tiny-dv4x8x8")
        if not self.videos:
            problems.append("give --videos, a folder of videos or images")
        if (self.width is None) != (self.height is None):
            problems.append("give both --width and --height, or neither")
        for name in "width height num_frames max_videos num_threads batch_size".split():
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} is {value}, which must be at least 1")
        if self.max_failures < 0:
            problems.append(f"max_failures is {self.max_failures}, which must be at least 0")
        if problems:
            raise ConfigError("; ".join(problems) + ".")

    @property
    def output(self) -> Path:
        """Where the results go."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        path = Path(self.tokenizer)
        is_file = path.suffix in (".jit", ".json", ".safetensors")
        name = path.resolve().parent.name if is_file else path.resolve().name
        return Path("evaluation") / "tokenizer" / (name or "tokenizer")


def _flag(name: str, help: str) -> Flag:
    return Flag(f"--{name}", name, help)


FLAGS = (
    _flag("tokenizer", "Hugging Face id, folder, .jit file, or tiny-dv4x8x8"),
    _flag("decoder", "another decoder than the tokenizer's own"),
    _flag("videos", "folder of videos and images, searched recursively"),
    _flag("output_dir", "folder for the results (default: evaluation/tokenizer/NAME)"),
    _flag("width", "resize and crop to this width (default: each video's own, in whole blocks)"),
    _flag("height", "likewise"),
    _flag("num_frames", f"first frames of each video (default: {DEFAULT_NUM_FRAMES} at most)"),
    _flag("max_videos", "only the first so many, by name (default: all)"),
    _flag("device", "auto, cpu, cuda"),
    _flag("dtype", "float32, bfloat16, float16 (default: the weights' own, float32 on the CPU)"),
    _flag("num_threads", "CPU threads (default: torch's)"),
    _flag("batch_size", "clips of equal size that are encoded together"),
    _flag("max_failures", "unreadable videos that still give exit code 0"),
    _flag("overwrite", "delete an earlier evaluation in the output folder"),
)
