"""A tokenizer's weights from one form into the other.

Flows in: a native folder, TorchScript files, a shipped name or a Hugging Face id. Flows out: a
folder in the other form, with the same hash:

    python -m cosmos_posttrain.tokenizer --source SOURCE --target FOLDER --target_format native
"""

from __future__ import annotations

from pathlib import Path

from cosmos_posttrain import files
from cosmos_posttrain.cli import parse
from cosmos_posttrain.errors import OutputFolderError
from cosmos_posttrain.tokenizer.config import FLAGS, TokenizerConversionConfig, validate


def convert_tokenizer(config: TokenizerConversionConfig) -> list[Path]:
    """Writes the source's weights, in their own dtype, in the other form.

    Returns:
        The files that were written.

    Raises:
        ConfigError: if a setting is missing or unknown.
        OutputFolderError: if a file to be written exists and may not be overwritten, or the folder
            cannot be written to.
        TokenizerError: if the source cannot be read, or is no DV network.
    """
    validate(config)
    target = Path(config.target)
    files.check_writable(target, "--target")
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
    prog = "python -m cosmos_posttrain.tokenizer"
    config = parse(TokenizerConversionConfig, FLAGS, None, prog, description)
    for path in convert_tokenizer(config):
        print(f"wrote {path}")
