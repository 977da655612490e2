"""Converts a checkpoint into another form; see docs/checkpoints.md."""

from __future__ import annotations

from cosmos_posttrain.checkpoint.convert import ConvertConfig, convert
from cosmos_posttrain.cli import Flag, parse
from cosmos_posttrain.launch import run_cli

FLAGS = (
    Flag("--source", "source", "Hugging Face id, checkpoint in any form, or run folder"),
    Flag("--target", "target", "folder to write"),
    Flag("--target_format", "target_format", "what to write"),
    Flag("--overwrite", "overwrite", "replace an earlier conversion in the target"),
    Flag("--verify", "verify", "read the result back and compare every tensor with the source's"),
    Flag("--model_config", "model_config", "config.json or size of a source that has no config"),
    Flag("--max_shard_gb", "max_shard_gb", "largest safetensors file in 10^9 bytes"),
)


def main() -> None:
    """Parses the command line and converts."""
    description = "Converts a checkpoint into model.pt, Megatron, NeMo or safetensors form."
    convert(parse(ConvertConfig, FLAGS, None, "convert_checkpoint.py", description))


if __name__ == "__main__":
    run_cli(main)
