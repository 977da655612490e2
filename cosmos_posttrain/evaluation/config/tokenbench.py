"""What ``evaluate.py tokenbench`` compares: its settings, flags and checks. No torch.

Flows in: the command line. Flows out: a ``TokenBenchConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.launch import DEVICES


@dataclass
class TokenBenchConfig:
    """Settings of ``evaluate.py tokenbench``.

    Attributes:
        gtpath: folder of the reference videos.
        targetpath: folder of the videos to score, of the same names; gets the results.
        output_dir: another folder for the results.
        recursive: also look in subfolders of both.
        width: pixels of the short side to which both videos are resized, their aspect kept; None
            compares the frames as they are.
        num_frames: first frames of each video; None takes all.
        skip_frames: of these, leave out so many first ones: those that were given to the model.
        lpips_weights: folder with torchvision's alexnet-owt-7be5be79.pth and LPIPS' alex.pth;
            None leaves LPIPS out.
        fvd_weights: the I3D network as TorchScript, i3d_torchscript.pt; None leaves rFVD out.
        device: of the two networks.
        num_workers: pairs that are compared at a time.
        max_failures: videos that may fail before the exit code is 1.
        overwrite: replace earlier results.
    """

    gtpath: str = ""
    targetpath: str = ""
    output_dir: str | None = None
    recursive: bool = False
    width: int | None = setting(None, at_least=8)
    num_frames: int | None = setting(None, at_least=1)
    skip_frames: int = setting(0, at_least=0)
    lpips_weights: str | None = None
    fvd_weights: str | None = None
    device: str = setting("auto", choices=DEVICES)
    num_workers: int = setting(4, at_least=1)
    max_failures: int = setting(0, at_least=0)
    overwrite: bool = False

    @property
    def output(self) -> Path:
        """Where the results go."""
        return Path(self.output_dir or self.targetpath)


FLAGS = (
    Flag("--gtpath"),
    Flag("--targetpath"),
    Flag("--output_dir"),
    Flag("--recursive"),
    Flag("--width"),
    Flag("--num_frames"),
    Flag("--skip_frames"),
    Flag("--lpips_weights"),
    Flag("--fvd_weights"),
    Flag("--device"),
    Flag("--num_workers"),
    Flag("--max_failures"),
    Flag("--overwrite"),
)


def validate(config: TokenBenchConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.gtpath:
        problems.append("--gtpath is missing: name the folder of the reference videos")
    if not config.targetpath:
        problems.append("--targetpath is missing: name the folder of the videos to score")
    if config.num_frames is not None and config.skip_frames >= config.num_frames:
        problems.append(
            f"--skip_frames {config.skip_frames} leaves nothing of --num_frames "
            f"{config.num_frames}: skip fewer"
        )
    check(config, flag_names(FLAGS), problems)
