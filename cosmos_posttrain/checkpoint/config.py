"""What a conversion is: its settings, flags and checks. No torch.

Flows in: defaults < YAML < flags < overrides (``cli.py``). Flows out: a
``CheckpointConversionConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.checkpoint.formats import registry
from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting


@dataclass
class CheckpointConversionConfig:
    """Settings of ``convert_checkpoint.py``.

    Attributes:
        source: Hugging Face id, checkpoint in any form, or run folder.
        target: folder to write.
        target_format: what to write.
        overwrite: replace an earlier conversion (or checkpoint) in the target.
        verify: read the written tensors back and compare each with the source's.
        model_config: config.json or size of a source that does not say what it holds.
        weights: ``last``, or ``ema``: the average that training keeps with ``--ema_decay``.
        max_shard_gb: largest file of a ``safetensors`` target, in 10^9 bytes.
    """

    source: str = ""
    target: str = ""
    target_format: str = setting("", choices=tuple(registry.WRITABLE))
    overwrite: bool = False
    verify: bool = False
    model_config: str | None = None
    weights: str = setting("last", choices=("last", "ema"))
    max_shard_gb: float = setting(5.0, above=0)


FLAGS = (
    Flag("--source"),
    Flag("--target"),
    Flag("--target_format"),
    Flag("--overwrite"),
    Flag("--verify"),
    Flag("--model_config"),
    Flag("--weights"),
    Flag("--max_shard_gb"),
)


def validate(config: CheckpointConversionConfig, world_size: int) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    needed = ("source", "target", "target_format")
    problems = [f"--{name} is missing" for name in needed if not getattr(config, name)]
    if world_size > 1:
        problems.append("conversion runs in one process: start it with plain python")
    check(config, flag_names(FLAGS), problems)
