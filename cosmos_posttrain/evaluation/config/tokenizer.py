"""What ``evaluate.py tokenizer`` measures: its settings, flags and checks. No torch.

Flows in: the command line. Flows out: a ``TokenizerEvalConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.launch import DEVICES, DTYPES

# Frames of a clip at most, where --num_frames is not given: 1 + a multiple of every published rate,
# 0.5 GB as float32 pixels at 640x1024.
DEFAULT_NUM_FRAMES = 65


@dataclass
class TokenizerEvalConfig:
    """Settings of ``evaluate.py tokenizer``.

    Attributes:
        tokenizer: Hugging Face id, folder, ``.jit`` file, or a shipped tokenizer's name.
        decoder: another decoder than the tokenizer's own.
        videos: folder of videos and images, searched recursively; one clip of each is evaluated.
        output_dir: folder for the results; None is ``evaluation/tokenizer/NAME`` with the
            tokenizer's name.
        width: pixels of the clips, after an aspect-preserving resize and a centre crop; None keeps
            each video's own pixels, centre-cropped to whole blocks. Goes with ``height``.
        height: likewise.
        num_frames: first frames of each video, 1 + a multiple of the tokenizer's; None is 65. A
            shorter video is evaluated on as many of its frames as fit the tokenizer.
        max_videos: only the first so many, by name; None takes all.
        device: ``auto`` is the GPU where there is one, else the CPU.
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
    width: int | None = setting(None, at_least=1)
    height: int | None = setting(None, at_least=1)
    num_frames: int | None = setting(None, at_least=1)
    max_videos: int | None = setting(None, at_least=1)
    device: str = setting("auto", choices=DEVICES)
    dtype: str | None = setting(None, choices=DTYPES)
    num_threads: int | None = setting(None, at_least=1)
    batch_size: int = setting(1, at_least=1)
    max_failures: int = setting(0, at_least=0)
    overwrite: bool = False

    @property
    def output(self) -> Path:
        """Where the results go."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        path = Path(self.tokenizer)
        is_file = path.suffix in (".jit", ".json", ".safetensors")
        name = path.resolve().parent.name if is_file else path.resolve().name
        return Path("evaluation") / "tokenizer" / (name or "tokenizer")


FLAGS = (
    Flag("--tokenizer"),
    Flag("--decoder"),
    Flag("--videos"),
    Flag("--output_dir"),
    Flag("--width"),
    Flag("--height"),
    Flag("--num_frames"),
    Flag("--max_videos"),
    Flag("--device"),
    Flag("--dtype"),
    Flag("--num_threads"),
    Flag("--batch_size"),
    Flag("--max_failures"),
    Flag("--overwrite"),
)


def validate(config: TokenizerEvalConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.tokenizer:
        problems.append("--tokenizer is missing: name one, such as tiny-dv4x8x8")
    if not config.videos:
        problems.append("--videos is missing: name a folder of videos or images")
    if (config.width is None) != (config.height is None):
        problems.append("--width and --height go together: give both or neither")
    check(config, flag_names(FLAGS), problems)
