"""A tokenizer's weights from one form into the other.

Flows in: a native folder, TorchScript files, a shipped name or a Hugging Face id. Flows out: a
folder in the other form, with the same hash:

    python -m cosmos_posttrain.tokenizer --source SOURCE --target FOLDER --target_format native
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain.cli import Flag, parse
from cosmos_posttrain.config import setting
from cosmos_posttrain.errors import ConfigError, OutputFolderError

FORMATS = ("native", "torchscript")
FLAGS = (
    Flag("--source", "source", "Hugging Face id, folder, .jit file, or shipped name"),
    Flag("--target", "target", "folder to write"),
    Flag("--target_format", "target_format", "what to write"),
    Flag("--overwrite", "overwrite", "replace the files of an earlier conversion"),
)


@dataclass
class ConvertConfig:
    """Settings of a conversion.

    Attributes:
        source: any path that ``load_tokenizer`` takes.
        target: the folder to write.
        target_format: one of ``FORMATS``.
        overwrite: replace the files of an earlier conversion.
    """

    source: str = ""
    target: str = ""
    target_format: str = setting("native", choices=FORMATS)
    overwrite: bool = False

    def validate(self) -> None:
        """Refuses settings that are missing or unknown.

        Raises:
            ConfigError: lists every problem.
        """
        problems = [f"--{name} is missing" for name in ("source", "target") if not vars(self)[name]]
        if self.target_format not in FORMATS:
            problems.append(f"--target_format is {self.target_format!r}, not one of {FORMATS}")
        if problems:
            raise ConfigError("; ".join(problems) + ".")


def convert_tokenizer(config: ConvertConfig) -> list[Path]:
    """Writes the source's weights, in their own dtype, in the other form.

    Returns:
        The files that were written.

    Raises:
        ConfigError: if a setting is missing.
        OutputFolderError: if a file to be written exists and may not be overwritten.
        TokenizerError: if the source cannot be read, or is no DV network.
    """
    config.validate()
    target = Path(config.target)
    names = {"native": ("config.json", "model.safetensors")}.get(
        config.target_format, ("encoder.jit", "decoder.jit")
    )
    paths = [target / name for name in names]
    present = [path for path in paths if path.exists()]
    if present and not config.overwrite:
        raise OutputFolderError(f"{present[0]} exists; give another --target, or --overwrite.")

    from cosmos_posttrain.tokenizer.export import export_torchscript
    from cosmos_posttrain.tokenizer.loading import load_network
    from cosmos_posttrain.tokenizer.weights_io import write_native

    network = load_network(config.source)
    if config.target_format == "native":
        write_native(target, network)
    else:
        export_torchscript(network, target)
    return paths


def main() -> None:
    """Parses the command line and converts."""
    description = "Converts a tokenizer between the native form and TorchScript."
    config = parse(ConvertConfig, FLAGS, None, "python -m cosmos_posttrain.tokenizer", description)
    for path in convert_tokenizer(config):
        print(f"wrote {path}")
