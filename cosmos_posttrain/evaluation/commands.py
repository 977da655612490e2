"""The commands of ``evaluate.py``. No torch.

Flows in: nothing. Flows out: of each command its help, settings and flags, and the module that has
its ``run(config)``, which is imported when the command is chosen, because it is heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cosmos_posttrain.cli import Flag
from cosmos_posttrain.evaluation.config import (
    generate,
    loss,
    onex,
    report,
    tokenbench,
    tokenizer,
)


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Attributes:
        help: one line.
        config_class: its settings.
        flags: its flags.
        module: has ``run(config)``.
    """

    help: str
    config_class: type
    flags: Sequence[Flag]
    module: str


COMMANDS = {
    "tokenbench": Command(
        "PSNR, SSIM, LPIPS and rFVD of a folder of videos against references of the same names.",
        tokenbench.TokenBenchConfig,
        tokenbench.FLAGS,
        "cosmos_posttrain.evaluation.tokenbench",
    ),
    "loss": Command(
        "How well a model foresees the tokens of held-out clips, beside baselines.",
        loss.LossEvalConfig,
        loss.FLAGS,
        "cosmos_posttrain.evaluation.loss",
    ),
    "generate": Command(
        "Generated clips of a split against the truth, floors, a ceiling, and the failure rate.",
        generate.GenerateEvalConfig,
        generate.FLAGS,
        "cosmos_posttrain.evaluation.generation.command",
    ),
    "tokenizer": Command(
        "PSNR, SSIM, codebook use and speed of a video tokenizer, with a contact sheet.",
        tokenizer.TokenizerEvalConfig,
        tokenizer.FLAGS,
        "cosmos_posttrain.evaluation.tokenizer",
    ),
    "onex": Command(
        "Loss of a model on windows of the 1X World Model Challenge, and a submission.",
        onex.OnexEvalConfig,
        onex.FLAGS,
        "cosmos_posttrain.evaluation.onex.command",
    ),
    "report": Command(
        "One page about training runs and their evaluations, for any browser.",
        report.ReportConfig,
        report.FLAGS,
        "cosmos_posttrain.evaluation.report.command",
    ),
}
