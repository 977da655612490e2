"""What ``evaluate.py generate`` generates and scores: its settings, flags and checks. No torch.

Flows in: the command line. Flows out: a ``GenerateEvalConfig``. The clips' size is the data set's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.data.config import SPLITS
from cosmos_posttrain.evaluation.config.loss import model_name
from cosmos_posttrain.inference.config import SESSION_FLAGS, SessionConfig

# What the data set says.
_OF_THE_DATA = ("--width", "--height", "--num_context_frames", "--tokenizer_compression_factor")


@dataclass
class GenerateEvalConfig(SessionConfig):
    """Settings of ``evaluate.py generate``.

    Attributes:
        data_path: folder that prepare_dataset.py wrote.
        split: which clips are continued.
        split_string: shares of train, validation and test by source video; by default those of the
            checkpoint's own run, else 98,1,1.
        split_seed: of the split; by default that of the checkpoint's own run, else 1234.
        videos: folder of the source videos (or of the jsonl), the truth that clips are scored
            against; by default the tokenizer's reconstruction of the stored tokens is.
        output_dir: folder for the results; None is evaluation/generate/NAME with the model's name.
        max_clips: so many clips at most, spread evenly over the split; None takes all.
        num_input_frames: given frames of each clip.
        num_samples: generated continuations of each clip.
        batch_size: continuations that are generated at once.
        temperature: 0 takes the most likely token each time.
        top_p: draws among the most likely tokens before which at most this mass lies.
        top_k: draws among this many most likely tokens.
        seed: of the draws.
        guidance_scale: how much the text counts, for a Video2World model.
        lpips_weights: folder with torchvision's alexnet-owt-7be5be79.pth and LPIPS' alex.pth;
            None leaves LPIPS out.
        sampson: also measure 3D consistency by the Sampson error; needs OpenCV.
        max_failures: clips that may be unreadable before the exit code is 1.
        num_threads: CPU threads; None leaves torch's number.
        overwrite: delete an earlier evaluation in the output folder and start anew.
    """

    ar_model_dir: str = ""
    data_path: str = ""
    split: str = setting("test", choices=SPLITS)
    split_string: str | None = None
    split_seed: int | None = None
    videos: str | None = None
    output_dir: str | None = None
    max_clips: int | None = setting(None, at_least=1)
    num_input_frames: int = setting(9, at_least=1)
    num_samples: int = setting(1, at_least=1)
    batch_size: int = setting(1, at_least=1)
    temperature: float = setting(1.0, at_least=0)
    top_p: float | None = setting(0.8, at_least=0, at_most=1)
    top_k: int | None = setting(None, at_least=1)
    seed: int = setting(0, at_least=0)
    guidance_scale: float = setting(1.0, at_least=0)
    lpips_weights: str | None = None
    sampson: bool = False
    max_failures: int = setting(0, at_least=0)
    num_threads: int | None = setting(None, at_least=1)
    overwrite: bool = False

    @property
    def output(self) -> Path:
        """Where the results go."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        return Path("evaluation") / "generate" / model_name(self.ar_model_dir)


FLAGS = (
    Flag("--data_path"),
    Flag("--split"),
    Flag("--split_string"),
    Flag("--split_seed"),
    Flag("--videos"),
    Flag("--output_dir"),
    Flag("--max_clips"),
    Flag("--num_input_frames"),
    Flag("--num_samples"),
    Flag("--batch_size"),
    Flag("--temperature"),
    Flag("--top_p"),
    Flag("--top_k"),
    Flag("--seed"),
    Flag("--guidance_scale"),
    Flag("--lpips_weights"),
    Flag("--sampson"),
    *(flag for flag in SESSION_FLAGS if flag.name not in _OF_THE_DATA),
    Flag("--max_failures"),
    Flag("--num_threads"),
    Flag("--overwrite"),
)


def validate(config: GenerateEvalConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.data_path:
        problems.append("--data_path is missing: name the folder that prepare_dataset.py wrote")
    if not config.ar_model_dir:
        problems.append("--ar_model_dir is missing: name a checkpoint or a run folder")
    if config.videos is not None and not Path(config.videos).is_dir():
        problems.append(f"--videos {config.videos} is not a folder: name the source videos'")
    if config.num_samples > 1 and config.temperature == 0:
        problems.append(
            f"--num_samples {config.num_samples} at --temperature 0 would all be the same: give "
            "a temperature above 0"
        )
    check(config, flag_names(FLAGS), problems)
