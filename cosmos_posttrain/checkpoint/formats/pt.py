"""``pt``: ``model.pt`` (a flat state dict) and ``config.json``, as the public models come.

The names are the public reference implementation's, and so are the fields of ``config.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain.checkpoint import infer_config
from cosmos_posttrain.checkpoint.formats.base import Contents, WritableFormat
from cosmos_posttrain.files import write_json
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.reference_config import to_reference

if TYPE_CHECKING:
    from cosmos_posttrain.checkpoint.weights import ReferenceWeights

WEIGHTS, CONFIG = "model.pt", "config.json"


class PtFormat(WritableFormat):
    """``model.pt`` with ``config.json``."""

    name = "pt"
    title = "model.pt with config.json"
    parts = (WEIGHTS, CONFIG)
    hub_files = (WEIGHTS, CONFIG)

    def detect(self, folder: Path) -> Path | None:
        return folder if (folder / WEIGHTS).is_file() else None

    def config(self, checkpoint: Path, named: ModelConfig | None) -> ModelConfig:
        return named or infer_config.config_beside(checkpoint, "a model.pt")

    def files(self, checkpoint: Path) -> list[Path]:
        return [checkpoint / WEIGHTS, checkpoint / CONFIG]

    def open(self, checkpoint: Path, config: ModelConfig) -> ReferenceWeights:
        from cosmos_posttrain.checkpoint import pt_file
        from cosmos_posttrain.checkpoint.weights import ReferenceWeights

        path = checkpoint / WEIGHTS
        state = pt_file.read(path)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        dtypes = {name: tensor.dtype for name, tensor in state.items()}
        return ReferenceWeights(state.__getitem__, shapes, dtypes, config, str(path))

    def write(self, folder: Path, contents: Contents) -> None:
        from cosmos_posttrain.checkpoint.pt_file import PtWriter

        writer = PtWriter(folder / WEIGHTS, contents.weights.tensors())
        try:
            for name, tensor in contents.weights.reference():
                writer.add(name, tensor)
            writer.finish()
        finally:
            writer.close()
        write_json(folder / CONFIG, to_reference(contents.config))
