"""The sections on what was run: an overview beside the curves, all details at the page's end.

Flows in: ``ReportedRun``s. Flows out: ``Section``s; a column a run, so that they can be compared.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.data.serial import to_plain
from cosmos_posttrain.evaluation.report import training
from cosmos_posttrain.evaluation.report.evaluations import Evaluation
from cosmos_posttrain.evaluation.report.runs import ReportedRun, default_settings, flattened
from cosmos_posttrain.evaluation.report.section import Section
from cosmos_posttrain.evaluation.report.tables import Cell, Table, cell, text_of, words

_ID_LENGTH = 12
_UNKNOWN = "not recorded"


def overview_section(runs: list[ReportedRun]) -> Section:
    """What each run is, in a dozen lines."""
    lines: list[tuple[str, Callable[[ReportedRun], Any]]] = [
        ("started from", _start),
        ("tokenizer", _tokenizer),
        ("tokenizer swap", swap_sentence),
        ("rows of the tokens", _embedding_start),
        ("clips", _clip),
        ("model", _model),
        ("steps", _steps),
        ("training loss at the end", training.final_loss),
        ("validation loss, lowest", lambda run: _at_step(training.lowest_validation(run))),
        ("validation loss, last", lambda run: _at_step(training.last_validation(run))),
        ("tokens/s, median", training.usual_speed),
        ("ran on", _machine),
        ("newest checkpoint", lambda run: str(run.checkpoints[-1])),
    ]
    rows = [[Cell(name), *(cell(of(run)) for run in runs)] for name, of in lines]
    return Section("overview", "What was run", tables=[_compared("", runs, rows)])


def details_section(runs: list[ReportedRun], evaluations: list[Evaluation]) -> Section:
    """Settings, contracts, environments and command lines."""
    tables = [
        *_settings_tables(runs),
        _of_plain("Data contract", runs, lambda run: to_plain(run.data.contract) or {}),
        _of_plain("Embedding transfer", runs, lambda run: run.data.embedding_transfer or {}),
        _of_plain("Model", runs, lambda run: run.model.to_json()),
        _of_plain("Environment", runs, _last_environment),
        *_evaluation_tables(evaluations),
    ]
    return Section(
        "details",
        "All settings",
        tables=[table for table in tables if table.rows],
        listings=[("Command lines", text)] if (text := _command_lines(runs, evaluations)) else [],
    )


def is_swap(run: ReportedRun) -> bool | None:
    """Whether the model knew another tokenizer before; None where that is not known."""
    old, new = _old_tokenizer(run), run.data.contract
    if old is None or new is None or not old.get("sha256"):
        return None
    return bool(old["sha256"] != new.tokenizer.sha256)


def swap_sentence(run: ReportedRun) -> str:
    """From which tokenizer to which."""
    swapped, old = is_swap(run), _old_tokenizer(run)
    if swapped is None or old is None or run.data.contract is None:
        began = run.data.started_from
        is_fresh = began is not None and "checkpoint" not in began
        return "none: fresh weights" if is_fresh else _UNKNOWN
    new = run.data.contract.tokenizer
    if not swapped:
        return f"none: the model knew {new.id}"
    return f"from {old.get('id')}{_rate(old.get('compression'))} to {_named(new)}"


def _old_tokenizer(run: ReportedRun) -> dict[str, Any] | None:
    for recorded, key in (
        (run.data.started_from, "tokenizer"),
        (run.data.embedding_transfer, "old_tokenizer"),
    ):
        value = (recorded or {}).get(key)
        if isinstance(value, dict):
            return value
    return None


def _rate(compression: Any) -> str:
    is_known = isinstance(compression, (list, tuple)) and len(compression) == 3
    return f" ({'x'.join(map(str, compression))})" if is_known else ""


def _named(tokenizer: TokenizerInfo) -> str:
    return f"{tokenizer.id}{_rate(tokenizer.compression)}"


def _start(run: ReportedRun) -> str:
    began = run.data.started_from or {}
    return str(began.get("model_path") or run.settings.get("model.path") or _UNKNOWN)


def _tokenizer(run: ReportedRun) -> str:
    if run.data.contract is None:
        return _UNKNOWN
    tokenizer = run.data.contract.tokenizer
    return (
        f"{_named(tokenizer)}, {tokenizer.vocab_size:,} codes, "
        f"sha256 {tokenizer.sha256[:_ID_LENGTH]}"
    )


def _embedding_start(run: ReportedRun) -> str:
    said = (run.data.started_from or {}).get("embedding_start")
    if isinstance(said, str):
        return said
    init = (run.data.embedding_transfer or {}).get("init")
    if init is not None:
        return str(init)
    return "drawn with the model, or its own" if run.data.started_from else _UNKNOWN


def _clip(run: ReportedRun) -> str:
    contract = run.data.contract
    if contract is None:
        return f"{run.model.seq_length:,} tokens {tuple(run.model.latent_shape)}"
    clip = contract.clip
    grid = "x".join(map(str, contract.latent_shape))
    return (
        f"{contract.kind}: {clip.num_frames} frames of {clip.width}x{clip.height}, "
        f"{grid} = {contract.seq_length:,} tokens"
    )


def _model(run: ReportedRun) -> str:
    model = run.model
    return (
        f"{model.num_parameters / 1e6:,.1f}M parameters, {model.num_layers} layers, "
        f"width {model.hidden_size}"
    )


def _steps(run: ReportedRun) -> str:
    wanted, done = run.settings.get("max_steps"), run.curves.num_steps
    text = f"{done:,}" + (f" of {wanted:,}" if isinstance(wanted, int) and wanted != done else "")
    samples = run.curves.consumed_samples
    return text if samples is None else f"{text}, {samples:,} clips"


def _at_step(found: tuple[float, float] | None) -> str | None:
    return None if found is None else f"{found[1]:.4f} at step {found[0]:,.0f}"


def _last_environment(run: ReportedRun) -> dict[str, Any]:
    found = run.launches[-1].get("environment") if run.launches else None
    shown = dict(found) if isinstance(found, dict) else {}
    shown.pop("command_line", None)
    return shown


def _machine(run: ReportedRun) -> str:
    found = _last_environment(run)
    if not found:
        return _UNKNOWN
    on = found.get("processor")
    if "gpu" in found:
        on = f"{found['gpu']}, {text_of(found.get('num_gpus'))} a machine"
    processes = found.get("num_processes", 1)
    parts = [on, f"{text_of(processes)} process{'es' if processes != 1 else ''}"]
    parts += [f"{name} {found[name]}" for name in ("torch", "megatron-core") if name in found]
    return ", ".join(str(part) for part in parts if part)


def _compared(caption: str, runs: list[ReportedRun], rows: list[list[Cell]], **more: Any) -> Table:
    names = [run.name for run in runs] if len(runs) > 1 else ["value"]
    return Table(caption, ["", *names], rows, can_sort=False, **more)


def _of_plain(
    caption: str, runs: list[ReportedRun], of: Callable[[ReportedRun], dict[str, Any]]
) -> Table:
    """One row a key of all runs' objects; rows that differ are marked."""
    objects = [flattened(of(run)) for run in runs]
    keys = list(dict.fromkeys(key for item in objects for key in item))
    rows = []
    for key in keys:
        values = [item.get(key) for item in objects]
        mark = "changed" if any(value != values[0] for value in values) else ""
        rows.append([Cell(words(key)), *(_plain_cell(value, mark) for value in values)])
    return _compared(caption, runs, rows, is_open=False)


def _plain_cell(value: Any, mark: str) -> Cell:
    """Settings are shown as they are, not rounded."""
    if value is None:
        return Cell("\N{EM DASH}", None, mark)
    text = text_of(value) if isinstance(value, (bool, list, tuple)) else str(value)
    return Cell(text, None, mark)


def _settings_tables(runs: list[ReportedRun]) -> list[Table]:
    """What was asked for, and all the rest."""
    usual = default_settings()
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    asked: list[list[Cell]] = []
    others: list[list[Cell]] = []
    for key in keys:
        values = [run.settings.get(key) for run in runs]
        changed = any(value != usual.get(key) for value in values)
        differs = any(value != values[0] for value in values)
        cells = [_plain_cell(value, "changed" if differs else "") for value in values]
        (asked if changed else others).append([Cell(key), *cells])
    return [
        _compared("Settings that are not the defaults", runs, asked),
        _compared("Settings at their defaults", runs, others, is_open=False),
    ]


def _command_lines(runs: list[ReportedRun], evaluations: list[Evaluation]) -> str:
    parts: list[tuple[str, Any]] = []
    for run in runs:
        for launch in run.launches:
            environment = launch.get("environment")
            if isinstance(environment, dict):
                head = f"{run.name}, {launch.get('started', '')}"
                num = environment.get("num_processes", 1)
                parts.append((f"{head}, {num} process(es)", environment.get("command_line")))
    for evaluation in evaluations:
        head = f"{evaluation.name}, evaluate.py {evaluation.command}"
        parts.append((head, evaluation.environment.get("command_line")))
    return "\n\n".join(
        f"# {head}\npython {_joined(line)}" for head, line in parts if isinstance(line, list)
    )


def _evaluation_tables(evaluations: list[Evaluation]) -> list[Table]:
    """Which evaluations the page shows, and the settings of each."""
    heads = ["evaluation", "command", "clips", "failures", "seconds", "file"]
    rows = [
        [
            *(cell(item.name), cell(item.command), cell(len(item.rows)), cell(len(item.failures))),
            *(cell(item.seconds), Cell(str(item.path))),
        ]
        for item in evaluations
    ]
    tables = [Table("Evaluations on this page", heads, rows, is_open=False)]
    for item in evaluations:
        values = flattened({"settings": item.settings, "environment": item.environment})
        values.pop("environment.command_line", None)
        listed = [[Cell(key), _plain_cell(value, "")] for key, value in values.items()]
        caption = f"Settings of evaluate.py {item.command}: {item.name}"
        tables.append(Table(caption, ["setting", "value"], listed, is_open=False, can_sort=False))
    return tables


def _joined(line: Sequence[Any]) -> str:
    return shlex.join([str(word) for word in line])
