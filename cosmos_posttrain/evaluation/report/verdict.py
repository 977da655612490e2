"""Is the new model good? What the measurements say, a sentence each, and what was not measured.

Flows in: runs, evaluations and the clips of a page. Flows out: ``Finding``s for the page's head.
"""

from __future__ import annotations

import math
import shlex
from collections import Counter
from dataclasses import dataclass

from cosmos_posttrain.evaluation.report import losses, shapes, training
from cosmos_posttrain.evaluation.report.clips import flags_of
from cosmos_posttrain.evaluation.report.evaluations import Evaluation
from cosmos_posttrain.evaluation.report.others import GENERATE
from cosmos_posttrain.evaluation.report.runs import ReportedRun
from cosmos_posttrain.evaluation.report.tables import number, words

GOOD, BAD, OPEN = "good", "bad", "open"
# A validation loss that is this much above its lowest has risen again.
_RISE = 1.01
_FLOORS = ("repeat", "flow", "motion", "floor")
_CEILING = "reconstruction"


@dataclass(frozen=True)
class Finding:
    """One sentence.

    Attributes:
        state: ``good``, ``bad``, or ``open`` where nothing was measured or nothing follows.
        heading: what it is about, in a word or two.
        text: the sentence.
        command: what would measure it, where nothing did.
    """

    state: str
    heading: str
    text: str
    command: str = ""


def findings(runs: list[ReportedRun], evaluations: list[Evaluation]) -> list[Finding]:
    """What is known, in the order in which one asks."""
    found = [_training(run, len(runs) > 1) for run in runs]
    loss = [item for item in evaluations if item.command == losses.COMMAND]
    generated = [item for item in evaluations if item.command == GENERATE]
    found += [_loss(item, len(loss) > 1) for item in loss]
    found += [_generation(item, len(generated) > 1) for item in generated]
    commands = Counter(item.command for item in evaluations)
    found += [item for e in evaluations if (item := _failures(e, commands[e.command] > 1))]
    if not loss:
        text = "Not measured: whether it foresees held-out clips better than simple baselines."
        found.append(Finding(OPEN, "Loss", text, _command(losses.COMMAND, runs[0])))
    if not generated:
        text = "Not measured: how close generated clips come to the truth, and how many fail."
        found.append(Finding(OPEN, "Generation", text, _command(GENERATE, runs[0])))
    return found


def _command(command: str, run: ReportedRun) -> str:
    """With the flags that both commands share."""
    path = run.settings.get("data.path") or "DATA"
    data = ",".join(path) if isinstance(path, list) else str(path)
    words = ["python", "evaluate.py", command, "--data_path", data]
    return shlex.join([*words, "--ar_model_dir", str(run.folder)])


def _about(heading: str, name: str, several: bool) -> str:
    return f"{heading}, {name}" if several else heading


def _training(run: ReportedRun, several: bool) -> Finding:
    heading = _about("Training", run.name, several)
    lowest, last = training.lowest_validation(run), training.last_validation(run)
    if lowest is None or last is None:
        loss = training.final_loss(run)
        ends = "" if loss is None else f", at a training loss of {loss:.3f} nats per token"
        text = f"Ended after {run.curves.num_steps:,} steps{ends}; nothing was validated."
        return Finding(OPEN, heading, text)
    if last[1] > _RISE * lowest[1]:
        return Finding(
            BAD,
            heading,
            f"The validation loss was lowest, {lowest[1]:.3f}, at step {lowest[0]:,.0f} and rose "
            f"to {last[1]:.3f} at step {last[0]:,.0f}: the model has begun to memorise; an earlier "
            "checkpoint, or more clips, will be better.",
        )
    return Finding(
        GOOD,
        heading,
        f"The validation loss ends at {last[1]:.3f} nats per token after {last[0]:,.0f} steps and "
        "has not risen again.",
    )


def _loss(evaluation: Evaluation, several: bool) -> Finding:
    heading = _about("Loss", evaluation.name, several)
    ours, best = losses.nats(evaluation.figures), losses.best_baseline(evaluation)
    if ours is None:
        return Finding(OPEN, heading, "The evaluation has no mean loss.")
    said = f"{ours:.3f} nats ({ours / math.log(2):.2f} bits) per token on held-out clips"
    if best is None:
        return Finding(OPEN, heading, f"{said}; there are no baselines to compare it with.")
    name, theirs = words(best[0]), best[1]
    if losses.is_gap_certain(evaluation, best[0]) is False:
        text = f"{said}, no further from the best baseline ({name}, {theirs:.3f}) than by chance."
        return Finding(BAD, heading, text)
    gap = abs(theirs - ours) / math.log(2)
    if ours < theirs:
        text = f"{said}, {gap:.2f} bits below the best baseline ({name}, {theirs:.3f} nats)."
        return Finding(GOOD, heading, text)
    text = (
        f"{said}, {gap:.2f} bits above a baseline without any network ({name}, {theirs:.3f} nats)."
    )
    return Finding(BAD, heading, text)


def _generation(evaluation: Evaluation, several: bool) -> Finding:
    """PSNR between the better floor and the ceiling."""
    heading = _about("Generation", evaluation.name, several)
    psnr: dict[str, float] = {}
    for path, value in shapes.scalars(evaluation.figures).items():
        of, quantity = shapes.split(path)
        if quantity == "psnr":
            psnr[of] = value
    ours = next((value for name, value in psnr.items() if name in ("", "generated")), None)
    if ours is None:
        return Finding(OPEN, heading, "Clips were generated; see their scores below.")
    said = f"Generated frames reach {ours:.2f} dB of PSNR"
    floors = [v for name, v in psnr.items() if any(word in name for word in _FLOORS)]
    ceiling = psnr.get(_CEILING)
    if not floors:
        return Finding(OPEN, heading, f"{said}.")
    floor = max(floors)
    top = "" if ceiling is None else f"; the tokenizer itself reaches {ceiling:.2f} dB"
    if ours > floor:
        text = f"{said}, {ours - floor:.2f} dB above the best guess without a model{top}."
        return Finding(GOOD, heading, text)
    text = (
        f"{said}, {floor - ours:.2f} dB below the best guess without a model ({number(floor)} dB)"
        f"{top}. PSNR favours guesses that stand still: look at the clips."
    )
    return Finding(BAD, heading, text)


def _failures(evaluation: Evaluation, several: bool) -> Finding | None:
    unread = len(evaluation.failures)
    flagged = sum(bool(flags_of(row)) for row in evaluation.rows)
    heading = _about("Failures", evaluation.name, several)
    said = []
    if flagged:
        said.append(f"{flagged:,} of {len(evaluation.rows):,} clips were flagged by a detector")
    if unread:
        said.append(f"{unread:,} could not be evaluated")
    if said:
        return Finding(BAD, heading, f"{' and '.join(said)} (evaluate.py {evaluation.command}).")
    if evaluation.command == GENERATE and evaluation.rows:
        text = f"None of {len(evaluation.rows):,} generated clips was flagged by a detector."
        return Finding(GOOD, heading, text)
    return None
