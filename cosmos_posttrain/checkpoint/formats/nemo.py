"""``nemo``: NeMo 2's ``weights/`` (torch_dist) and ``context/`` (``io.json``, ``model.yaml``).

What is written has this package's own context files beside NeMo's, so it is a ``megatron`` folder
to this package.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain.checkpoint import nemo_context
from cosmos_posttrain.checkpoint.formats import megatron
from cosmos_posttrain.checkpoint.formats.base import Contents, WritableFormat
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.models.config import ModelConfig

if TYPE_CHECKING:
    from cosmos_posttrain.checkpoint.torch_dist_weights import TorchDistWeights

# Where Hugging Face repositories of Cosmos models keep it.
SUBFOLDER = "nemo"


class NemoFormat(WritableFormat):
    """A NeMo 2 checkpoint."""

    name = "nemo"
    title = "a NeMo 2 checkpoint (weights/ and context/)"
    parts = (megatron.WEIGHTS, megatron.CONTEXT)
    hub_files = (f"{SUBFOLDER}/*",)

    def detect(self, folder: Path) -> Path | None:
        candidates = [folder / SUBFOLDER, folder]
        candidates += [folder.parent] if folder.name == megatron.WEIGHTS else []
        for checkpoint in candidates:
            if nemo_context.has_context(checkpoint):
                if not (checkpoint / megatron.WEIGHTS).is_dir():
                    raise CheckpointError(
                        f"{checkpoint} is a NeMo checkpoint without weights/; copy or download it "
                        "again."
                    )
                return checkpoint
        return None

    def config(self, checkpoint: Path, named: ModelConfig | None) -> ModelConfig:
        from cosmos_posttrain.checkpoint.torch_dist_weights import check_form, config_from_tensors

        weights = checkpoint / megatron.WEIGHTS
        check_form(weights)
        known = nemo_context.read(checkpoint) if named is None else {}
        return config_from_tensors(weights, known, named, checkpoint)

    def files(self, checkpoint: Path) -> list[Path]:
        return megatron.folder_files(checkpoint)

    def open(self, checkpoint: Path, config: ModelConfig) -> TorchDistWeights:
        from cosmos_posttrain.checkpoint.torch_dist_weights import TorchDistWeights

        return TorchDistWeights(checkpoint / megatron.WEIGHTS, config)

    def write(self, folder: Path, contents: Contents) -> None:
        megatron.write_folder(folder, contents)
        nemo_context.write(folder, contents.config)
