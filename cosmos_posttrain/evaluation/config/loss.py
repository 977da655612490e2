"""What ``evaluate.py loss`` measures: its settings, flags and checks. No torch.

Flows in: the command line. Flows out: a ``LossEvalConfig``; fields that are left out follow from
the checkpoint, in ``loss_inputs.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.data.config import SPLITS
from cosmos_posttrain.launch import DTYPES
from cosmos_posttrain.models.config import LAYER_SPECS, ROPE_SCALINGS


@dataclass
class LossEvalConfig:
    """Settings of ``evaluate.py loss``.

    Attributes:
        data_path: folder that prepare_dataset.py wrote, or the original recipe's layout.
        ar_model_dir: the model: checkpoint, run folder, folder with model.pt, Hugging Face id, or
            random:tiny.
        checkpoint_dir: where bare names of models are looked up.
        split: which clips are scored.
        split_string: shares of train, validation and test by source video; by default those of the
            checkpoint's own run, else 98,1,1.
        seed: of the split; by default that of the checkpoint's own run, else 1234.
        output: the JSON file to write, or a folder, which gets metrics.json; by default
            evaluation/loss/NAME with the model's name.
        max_clips: so many clips at most, spread evenly over the split.
        num_condition_latents: latent frames at each clip's start that are not scored; by default as
            in the checkpoint's own run, else 0.
        max_train_clips: clips of the training split that the baselines are fitted on, at most.
        max_pairs: distinct pairs of tokens that the bigram keeps, at most; 60 bytes of memory each.
        max_failures: clips that may fail before the exit code is 1.
        micro_batch_size: clips of a forward pass of one rank.
        tensor_model_parallel_size: processes that share each layer; what is left of the processes
            scores other clips.
        pipeline_model_parallel_size: processes that share the layers in sequence.
        context_parallel_size: processes that share each clip.
        sequence_parallel: split activations between layers over the tensor-parallel processes.
        layer_spec: layers of the model.
        dtype: of the model; by default the checkpoint's on a GPU and float32 on the CPU.
        rope_scaling: positions where the data's grid is larger than the checkpoint's.
        rope_scale: replaces the ratio of the two grids.
        latent_shape: grid T,H,W; needed only for data without a manifest.
        vocab_size: vocabulary; needed only for data without a manifest.
        allow_tokenizer_mismatch: score tokens of another tokenizer or clip size than the
            checkpoint's.
        num_threads: CPU threads per process; None means torch's own choice.
        overwrite: delete an earlier evaluation and start anew.
    """

    data_path: str = ""
    ar_model_dir: str = ""
    checkpoint_dir: str = "checkpoints"
    split: str = setting("test", choices=SPLITS)
    split_string: str | None = None
    seed: int | None = None
    output: str | None = None
    max_clips: int | None = setting(None, at_least=1)
    num_condition_latents: int | None = setting(None, at_least=0)
    max_train_clips: int = setting(20_000, at_least=1)
    max_pairs: int = setting(20_000_000, at_least=1)
    max_failures: int = setting(0, at_least=0)
    micro_batch_size: int = setting(1, at_least=1)
    tensor_model_parallel_size: int = setting(1, at_least=1)
    pipeline_model_parallel_size: int = setting(1, at_least=1)
    context_parallel_size: int = setting(1, at_least=1)
    sequence_parallel: bool = False
    layer_spec: str = setting("torch", choices=LAYER_SPECS)
    dtype: str | None = setting(None, choices=DTYPES)
    rope_scaling: str = setting("none", choices=ROPE_SCALINGS)
    rope_scale: float | None = setting(None, at_least=1)
    latent_shape: str | None = None
    vocab_size: int | None = setting(None, at_least=1)
    allow_tokenizer_mismatch: bool = False
    num_threads: int | None = setting(None, at_least=1)
    overwrite: bool = False

    @property
    def metrics_file(self) -> Path:
        """The file to write."""
        if self.output is None:
            return Path("evaluation") / "loss" / model_name(self.ar_model_dir) / "metrics.json"
        path = Path(self.output)
        return path if path.suffix == ".json" else path / "metrics.json"


def model_name(model: str) -> str:
    """``runs/a`` -> ``a``; ``runs/a/default/checkpoints/epoch=0-step=9`` -> ``a-step=9``."""
    path = Path(model).resolve()
    if path.parent.name == "checkpoints" and "-step=" in path.name:
        return f"{path.parents[2].name}-{path.name.partition('-')[2]}"
    return path.name.replace(":", "-")


FLAGS = (
    Flag("--data_path"),
    Flag("--ar_model_dir"),
    Flag("--checkpoint_dir"),
    Flag("--split"),
    Flag("--split_string"),
    Flag("--seed"),
    Flag("--output"),
    Flag("--max_clips"),
    Flag("--num_condition_latents"),
    Flag("--max_train_clips"),
    Flag("--max_pairs"),
    Flag("--max_failures"),
    Flag("--micro_batch_size"),
    Flag("--tensor_model_parallel_size"),
    Flag("--pipeline_model_parallel_size"),
    Flag("--context_parallel_size"),
    Flag("--sequence_parallel"),
    Flag("--layer_spec"),
    Flag("--dtype"),
    Flag("--rope_scaling"),
    Flag("--rope_scale"),
    Flag("--latent_shape"),
    Flag("--vocab_size"),
    Flag("--allow_tokenizer_mismatch"),
    Flag("--num_threads"),
    Flag("--overwrite"),
)


def validate(config: LossEvalConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.data_path:
        problems.append("--data_path is missing: name the folder that prepare_dataset.py wrote")
    if not config.ar_model_dir:
        problems.append("--ar_model_dir is missing: name a checkpoint or a run folder")
    if config.sequence_parallel and config.tensor_model_parallel_size == 1:
        problems.append("--sequence_parallel needs --tensor_model_parallel_size above 1")
    check(config, flag_names(FLAGS), problems)
