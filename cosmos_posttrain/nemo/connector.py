"""Our models in NeMo's ``import_ckpt`` and ``export_ckpt``, and in its restore.

Flows in: ``FORMAT://path``, with any model path that ``open_source`` reads behind it; or a NeMo
checkpoint and the name of a format. Flows out: a NeMo checkpoint, or one in that format. The work
is ``convert``'s: no model is built, and weights keep every bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint import nemo_context
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert
from cosmos_posttrain.checkpoint.formats import registry
from cosmos_posttrain.checkpoint.formats.nemo import NemoFormat
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.nemo.config import CosmosConfig
from cosmos_posttrain.nemo.extra import is_installed

if is_installed():
    from nemo.lightning.io.connector import ModelConnector
    from nemo.lightning.io.mixin import ConnectorMixin
else:
    ModelConnector, ConnectorMixin = type(Path()), type("ConnectorMixin", (), {})


class CosmosImporter(ModelConnector):
    """Makes a NeMo checkpoint of any model path; the path is this object itself.

    Attributes:
        model_class: the class of NeMo's whose checkpoints these are.
    """

    model_class: ClassVar[Any] = None

    def init(self) -> Any:
        """A model of these numbers, not built yet.

        Raises:
            CheckpointError: the path holds no model.
        """
        config = open_source(str(self)).config
        dtype = launch.parse_dtype(config.params_dtype)
        # As NeMo reads it from a context; there may be no process groups yet.
        settings = CosmosConfig(**nemo_context.values_of(config), params_dtype=dtype)
        return self.model_class(settings)

    def apply(self, output_path: Path) -> Path:
        """Writes the checkpoint.

        Raises:
            UserError: see ``convert``.
        """
        return _converted(self, output_path, NemoFormat.name)


class CosmosExporter(ModelConnector):
    """Makes a checkpoint in another format of a NeMo checkpoint, whose path is this object itself.

    Attributes:
        target_format: the format's name.
    """

    target_format: ClassVar[str] = ""

    def apply(self, output_path: Path) -> Path:
        """Writes the checkpoint.

        Raises:
            UserError: see ``convert``.
        """
        return _converted(self, output_path, self.target_format)


def _converted(source: Path, target: Path, target_format: str) -> Path:
    convert(CheckpointConversionConfig(str(source), str(target), target_format))
    return target


class Connected(ConnectorMixin):
    """A Lightning module that NeMo imports, exports and restores; subclasses are registered.

    Attributes:
        model_transform: NeMo's adapters; ours lie inside the model.
        bare_module: this rank's part of the model, without what NeMo wraps around it.
    """

    model_transform: Any = None
    bare_module: Any

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if not is_installed():
            return
        importer = type(CosmosImporter.__name__, (CosmosImporter,), {"model_class": cls})
        for form in registry.FORMATS:
            cls.register_importer(form.name)(importer)
        for name in registry.WRITABLE:
            exporter = type(CosmosExporter.__name__, (CosmosExporter,), {"target_format": name})
            cls.register_exporter(name)(exporter)

    def sharded_state_dict(self, prefix: str = "", **settings: Any) -> dict[str, Any]:
        """What NeMo saves and restores of this rank's part.

        The wrapper takes no part in the keys. The modules' own notes (of fp8, which is not used)
        are left out: no checkpoint of this package holds them, and NeMo would ask for them.
        """
        state = self.bare_module.sharded_state_dict(prefix=f"{prefix}module.", **settings)
        return {key: value for key, value in state.items() if "_extra_state" not in key}
