"""What ``evaluate.py onex`` measures: its settings, flags and checks. No torch.

Flows in: the command line. Flows out: an ``OnexEvalConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.evaluation.config.loss import model_name
from cosmos_posttrain.launch import DTYPES
from cosmos_posttrain.models.config import LAYER_SPECS, ROPE_SCALINGS

# Key in metrics.json of each part of the evaluation.
NEXT_8_FRAMES = "next_8_frames"
TEACHER_FORCED = "next_17_frames_teacher_forced"
ROLLOUT = "next_17_frames_rollout"
PARTS = (NEXT_8_FRAMES, TEACHER_FORCED, ROLLOUT)


@dataclass
class OnexEvalConfig:
    """Settings of ``evaluate.py onex``.

    Attributes:
        input_type: tokens, the only kind here.
        input_tokens_dir: a v2.0 set of the 1X World Model Challenge, as 1X ships it or as
            prepare_dataset.py imported it.
        ar_model_dir: the model: checkpoint, run folder, folder with model.pt, Hugging Face id, or
            random:SIZE.
        checkpoint_dir: where a bare name of a model is looked up.
        only_eval: accepted for old commands: this one makes no videos.
        top_p: accepted for old commands: no figure depends on it.
        temperature: likewise; the rollout takes the most likely token each time.
        video_save_name: names the output folder where --output_dir is not given.
        output_dir: folder for the results; None is ``evaluation/onex/NAME``, with the video's name
            or the model's.
        parts: which figures, separated by commas.
        max_windows: windows that are predicted at most with the truth given, evenly spread; None is
            all.
        max_rollouts: windows that are predicted at most by a greedy rollout, evenly spread.
        batch_size: windows in one pass of the model.
        write_submission: also write the 500 most likely tokens of every token of the rollouts.
        test_set: the folder is 1X's test set, without segments: every window is given, and what
            follows is not known; only a submission is written.
        tensor_model_parallel_size: processes that share the model; by default all that torchrun
            started.
        layer_spec: layers of the model.
        dtype: of the model; by default the checkpoint's on a GPU and float32 on the CPU.
        rope_scaling: positions where a window's grid is larger than the checkpoint's.
        rope_scale: replaces the ratio of the two grids.
        allow_tokenizer_mismatch: measure a model that was trained on another tokenizer's tokens.
        num_threads: CPU threads; None leaves torch's number.
        overwrite: delete an earlier evaluation in the output folder and start anew.
    """

    input_type: str = setting("tokens", choices=("tokens",))
    input_tokens_dir: str = ""
    ar_model_dir: str = "Cosmos-1.0-Autoregressive-4B"
    checkpoint_dir: str = "checkpoints"
    only_eval: bool = True
    top_p: float | None = setting(None, at_least=0, at_most=1)
    temperature: float | None = setting(None, at_least=0)
    video_save_name: str | None = None
    output_dir: str | None = None
    parts: str = ",".join(PARTS)
    max_windows: int | None = setting(None, at_least=1)
    max_rollouts: int | None = setting(64, at_least=1)
    batch_size: int = setting(1, at_least=1)
    write_submission: bool = False
    test_set: bool = False
    tensor_model_parallel_size: int | None = setting(None, at_least=1)
    layer_spec: str = setting("torch", choices=LAYER_SPECS)
    dtype: str | None = setting(None, choices=DTYPES)
    rope_scaling: str = setting("none", choices=ROPE_SCALINGS)
    rope_scale: float | None = setting(None, at_least=1)
    allow_tokenizer_mismatch: bool = False
    num_threads: int | None = setting(None, at_least=1)
    overwrite: bool = False

    @property
    def output(self) -> Path:
        """Where the results go."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        name = Path(self.video_save_name).name if self.video_save_name else ""
        return Path("evaluation") / "onex" / (name or model_name(self.ar_model_dir))

    @property
    def chosen_parts(self) -> tuple[str, ...]:
        """The parts to measure, in their order."""
        if self.test_set:
            return (ROLLOUT,)
        asked = {part.strip() for part in self.parts.split(",")}
        return tuple(part for part in PARTS if part in asked)

    @property
    def submits(self) -> bool:
        """Whether a submission is written."""
        return self.write_submission or self.test_set


FLAGS = (
    Flag("--input_type"),
    Flag("--input_tokens_dir"),
    Flag("--ar_model_dir"),
    Flag("--checkpoint_dir"),
    Flag("--only_eval"),
    Flag("--top_p"),
    Flag("--temperature"),
    Flag("--video_save_name"),
    Flag("--output_dir"),
    Flag("--parts"),
    Flag("--max_windows"),
    Flag("--max_rollouts"),
    Flag("--batch_size"),
    Flag("--write_submission"),
    Flag("--test_set"),
    Flag("--tensor_model_parallel_size"),
    Flag("--layer_spec"),
    Flag("--dtype"),
    Flag("--rope_scaling"),
    Flag("--rope_scale"),
    Flag("--allow_tokenizer_mismatch"),
    Flag("--num_threads"),
    Flag("--overwrite"),
)


def validate(config: OnexEvalConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.input_tokens_dir:
        problems.append("--input_tokens_dir is missing: name a v2.0 set of the 1X challenge")
    if not config.only_eval:
        problems.append("--no-only_eval asks for videos, which this command does not make")
    unknown = sorted({part.strip() for part in config.parts.split(",")} - set(PARTS))
    if unknown:
        problems.append(f"--parts {unknown[0]!r} is none of {', '.join(PARTS)}")
    if config.write_submission and ROLLOUT not in config.chosen_parts:
        problems.append(f"--write_submission needs {ROLLOUT} among --parts")
    check(config, flag_names(FLAGS), problems)
