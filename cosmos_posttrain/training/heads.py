"""Medusa heads in a run: what can be trained, and what is said of it.

Flows in: a run's config and the model that it starts from. Flows out: a sentence.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from cosmos_posttrain import launch
from cosmos_posttrain.checkpoint.source import CheckpointSource
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.training.config import TrainConfig


def check(config: TrainConfig, source: CheckpointSource, resume_from: Path | None) -> None:
    """Refuses Medusa heads that cannot be trained.

    Raises:
        ConfigError: fresh weights that would stay fresh, more heads than a latent frame has tokens,
            or other settings than the run began with.
    """
    count, known = config.model.num_medusa_heads, source.config.num_medusa_heads
    if resume_from is not None and count != known:
        raise ConfigError(
            f"the run in {config.log_dir} has {known} Medusa heads, not {count}; give "
            f"--medusa_num_heads {known}, or start a run in another --log_dir."
        )
    if not count:
        return
    freezes = config.model.medusa_freeze_backbone
    if resume_from is not None and _froze_backbone(resume_from) not in (None, freezes):
        begun, flag = "trained", "--no-medusa_freeze_backbone"
        if not freezes:
            begun, flag = "frozen", "--medusa_freeze_backbone"
        raise ConfigError(
            f"the run in {config.log_dir} began with its backbone {begun}; give {flag}, or start a "
            "run in another --log_dir."
        )
    if resume_from is None and source.is_fresh and freezes:
        raise ConfigError(
            f"{config.model.path} has fresh weights, from which frozen no head can learn; give "
            "--no-medusa_freeze_backbone, or name a trained model with --model_path."
        )
    largest = source.config.latent_shape.tokens_per_frame
    if count > largest:
        raise ConfigError(
            f"--medusa_num_heads {count} must be at most {largest}, the tokens of a latent frame."
        )


def _froze_backbone(checkpoint: Path) -> bool | None:
    """As the checkpoint's run had it; None where that is not recorded."""
    try:
        text = (checkpoint / "context" / "config.yaml").read_text(encoding="utf-8")
        return bool(yaml.safe_load(text)["model"]["medusa_freeze_backbone"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def announce(config: TrainConfig, source: CheckpointSource, begins_anew: bool) -> None:
    """Says which heads there are.

    Args:
        config: of the run.
        source: that the model is read from.
        begins_anew: the source's heads are not taken.
    """
    count, known = config.model.num_medusa_heads, source.config.num_medusa_heads
    if not count and known:
        launch.say(
            f"note: the model's {known} Medusa heads are left out, since they would no longer fit "
            f"it; --medusa_num_heads {known} trains them, too."
        )
    if count:
        kept = 0 if begins_anew else min(known, count)
        rest = "alone" if config.model.medusa_freeze_backbone else "with the model"
        launch.say(f"{count} Medusa heads, {kept} of them the checkpoint's, are trained {rest}")
