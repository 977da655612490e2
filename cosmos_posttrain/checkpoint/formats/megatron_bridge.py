"""``megatron_bridge``: Megatron-Bridge's ``iter_N/`` in torch_dist with ``run_config.yaml``.

The folder around them names its newest one in ``latest_checkpointed_iteration.txt`` and
``latest_train_state.pt``; ``run_config.yaml`` comes last, so that a folder without one is not
complete. It names classes of the program that wrote it, which are only names here: nothing of it is
imported. The tensors' keys have no prefix.

What is written is iteration 0, as where Bridge imports a model. Its ``model`` section names no
class of Bridge's, whose own models leave out the 3D positions without a word.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_posttrain.checkpoint import context, nemo_context
from cosmos_posttrain.checkpoint.formats.base import Contents, WritableFormat
from cosmos_posttrain.checkpoint.formats.torch_dist import TRACKER, newest_iteration
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.files import write_text
from cosmos_posttrain.models.config import ModelConfig

if TYPE_CHECKING:
    from cosmos_posttrain.checkpoint.torch_dist_weights import TorchDistWeights

RUN_CONFIG, STATE, LATEST_STATE = "run_config.yaml", "train_state.pt", "latest_train_state.pt"
FIRST = "iter_0000000"
PROVIDER = "cosmos_posttrain.bridge.CosmosModelProvider"
_FORM = "torch_dist"
# What Bridge keeps of a run's progress, each as a tensor without axes.
_COUNTS = (
    "step",
    "consumed_train_samples",
    "skipped_train_samples",
    "consumed_valid_samples",
)
_SWITCHES = ("do_train", "do_valid", "do_test")
# How Megatron names the tensors: the key of each kind holds all layers.
_LAYOUT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_ITERATION = re.compile(r"iter_\d+")


class MegatronBridgeFormat(WritableFormat):
    """A checkpoint of Megatron-Bridge."""

    name = "megatron_bridge"
    title = f"a checkpoint of Megatron-Bridge (iter_N/ with {RUN_CONFIG})"
    parts = ()  # other iterations of a run, and the files that name the newest, are not replaced

    def detect(self, folder: Path) -> Path | None:
        if (folder / RUN_CONFIG).is_file():
            return folder
        complete = [path.parent for path in folder.glob(f"iter_*/{RUN_CONFIG}")]
        complete = [path for path in complete if _ITERATION.fullmatch(path.name)]
        if not complete:
            return None
        latest = max(complete, key=lambda path: int(path.name.removeprefix("iter_")))
        (named,) = newest_iteration(folder) or (latest,)
        if named not in complete:
            raise CheckpointError(
                f"{folder / TRACKER} names {named.name}, which is not there or not complete; give "
                f"one that is, such as {latest}."
            )
        return named

    def config(self, checkpoint: Path, named: ModelConfig | None) -> ModelConfig:
        from cosmos_posttrain.checkpoint.torch_dist_weights import check_form, config_from_tensors

        run = _run_config(checkpoint)
        check_form(checkpoint)
        known = nemo_context.stated(run["model"]) if named is None else {}
        return config_from_tensors(checkpoint, known, named, checkpoint)

    def data(self, checkpoint: Path) -> context.TrainingData | None:
        return context.read_data(checkpoint)

    def files(self, checkpoint: Path) -> list[Path]:
        own = sorted(path for path in checkpoint.iterdir() if path.is_file())
        return [*own, context.data_path(checkpoint)]

    def open(self, checkpoint: Path, config: ModelConfig) -> TorchDistWeights:
        from cosmos_posttrain.checkpoint.torch_dist_weights import TorchDistWeights

        return TorchDistWeights(checkpoint, config)

    def write(self, folder: Path, contents: Contents) -> None:
        import yaml

        from cosmos_posttrain.checkpoint import torch_dist_weights

        config, weights = contents.config, contents.weights
        torch_dist_weights.check_stackable(weights.tensors(), config)
        checkpoint = folder / FIRST
        checkpoint.mkdir()
        tensors = weights.all_megatron()
        common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": _LAYOUT}
        torch_dist_weights.write_torch_dist(checkpoint, config, tensors, prefix="", common=common)
        if contents.data is not None:
            context.write_data(checkpoint, contents.data)
        for path in (checkpoint / STATE, folder / LATEST_STATE):
            path.write_bytes(_no_progress())
        write_text(folder / TRACKER, "0")
        write_text(checkpoint / RUN_CONFIG, yaml.safe_dump(_own_run_config(config)))


def _run_config(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's ``run_config.yaml``, where it is one of a whole model.

    Raises:
        CheckpointError: it is damaged, of another form, or of adapters alone.
    """
    path = checkpoint / RUN_CONFIG
    tree = nemo_context.read_yaml(path)
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise CheckpointError(f"{path} has no section model; copy it again.")
    saving = tree.get("checkpoint")
    form = saving.get("ckpt_format") if isinstance(saving, dict) else None
    if form not in (None, _FORM):
        raise CheckpointError(
            f"{checkpoint} is in Megatron-Bridge's form {form}; save it there with ckpt_format "
            f"{_FORM}."
        )
    if tree.get("peft") is not None:
        raise CheckpointError(
            f"{checkpoint} holds adapters without their model; merge them in Megatron-Bridge, then "
            "give the result."
        )
    return tree


def _no_progress() -> bytes:
    """A state of training that has not begun."""
    import torch

    state = {name: torch.tensor(0, dtype=torch.int32) for name in _COUNTS}
    state["floating_point_operations_so_far"] = torch.tensor(0.0, dtype=torch.float64)
    state |= {name: torch.tensor(False) for name in _SWITCHES}
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def _own_run_config(config: ModelConfig) -> dict[str, Any]:
    """What Bridge asks of a checkpoint's run: the model's numbers, and what was saved."""
    model = {
        "_target_": PROVIDER,
        **nemo_context.values_of(config),
        "params_dtype": {"_target_": f"torch.{config.params_dtype}", "_call_": False},
        "share_embeddings_and_output_weights": False,
        "should_pad_vocab": True,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    saved = {"save_optim": False, "save_rng": False, "fully_parallel_save": True}
    return {
        "model": model,
        "checkpoint": {"ckpt_format": _FORM, **saved},
        "tokenizer": None,
        "peft": None,
    }
