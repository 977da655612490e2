"""The reproduction pack: what it lists stands in the documents, and it says what does not hold."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from helpers.distributed_run import REPOSITORY_DIR, run_script

from cosmos_posttrain.errors import ConfigError, CosmosPosttrainError
from cosmos_posttrain.reproduce.config import ReproduceConfig
from cosmos_posttrain.reproduce.figures import Figure, Value, choose, load_figures, table
from cosmos_posttrain.reproduce.run import run

FIGURES = load_figures()


def test_figures_have_names_of_their_own() -> None:
    assert len({figure.name for figure in FIGURES}) == len(FIGURES) >= 8
    assert {figure.document for figure in FIGURES} == {
        "docs/benchmarks.md",
        "docs/embedding_transfer.md",
    }


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_values_and_commands_stand_in_the_document(figure: Figure) -> None:
    text = (REPOSITORY_DIR / figure.document).read_text(encoding="utf-8")
    for value in figure.values:
        re.compile(value.pattern)
        assert value.tolerance is not None or value.at_least or value.at_most
        if value.value is not None:
            assert re.search(rf"(?<![\d.]){value.value:g}0*(?!\d)", text), value
    words = shlex.split(figure.command)
    files = [word for word in words if "/" in word and "=" not in word and "{" not in word]
    assert files
    for file in files:
        assert (REPOSITORY_DIR / file).is_file(), file
        if figure.name != "quickstart":  # make quickstart, there
            assert Path(file).name in text


def test_patterns_find_what_the_commands_print() -> None:
    values = {figure.name: figure.values for figure in FIGURES}
    bench = (
        "tiny-dv4x8x8:17,96,160  cpu float32, 1 thread(s)\n"
        "  native             encode    523.0  decode    356.0 frames/s\n"
        "  published layout   encode    423.0  decode    155.0 frames/s  "
        "native is 1.87x as fast as this\n"
        "tiny-dv8x16x16:17,96,160  cpu float32, 1 thread(s)\n"
        "  native             encode   1668.0  decode    934.0 frames/s\n"
        "  published layout   encode    659.0  decode    278.0 frames/s  "
        "native is 3.07x as fast as this\n"
    )
    assert [value.find(bench) for value in values["tokenizer_speed"]] == [1.87, 3.07]
    small = "| aligned | 2.519 | 1.901 | 1.698 | 1.601 | 1.513 | 1.400, 1.571, 1.567 |"
    real = "| aligned | 5.519 | 5.401 | 5.398 | 5.301 | 5.400, 5.571, 5.567 |"
    printed = f"{small}\n| aligned | 48 | 92 | 132 | 199 | 200, 187, - |\n{real}\n"
    assert [v.find(printed) for v in values["embedding_transfer"][:2]] == [2.519, 1.513]
    assert values["embedding_transfer"][-3].find(printed) == 5.301
    quick = "post-trained: training loss 7.031 -> 4.089 nats/token (first 5, last 20 steps)"
    assert [v.find(quick) for v in values["quickstart"][:2]] == [7.031, 4.089]


def figure_of(command: str, *values: Value, needs: str | None = None) -> Figure:
    return Figure("one", "docs/benchmarks.md", command, "0", 1, values, needs)


def test_a_figure_is_run_and_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = ReproduceConfig(str(tmp_path))
    near = Value("loss", r"loss ([\d.]+)", 1.0, 0.1)
    command = "mkdir -p {output} && pwd && echo loss 5 && echo loss 1.05"
    (result,) = run([figure_of(command, near)], config)
    assert result["holds"] and result["values"][0]["found"] == 1.05  # the last one
    assert (tmp_path / "one" / "output").is_dir()
    assert str(REPOSITORY_DIR) in (tmp_path / "one" / "log.txt").read_text()
    assert json.loads((tmp_path / "one" / "result.json").read_text())["holds"]
    assert "holds: loss: 1.05 (1 +- 0.1)" in capfd.readouterr().out
    for command, said in (
        ("echo loss 1.2", "DOES NOT HOLD: loss: 1.2"),
        ("echo nothing", "DOES NOT HOLD: loss: nothing"),
        ("echo loss 1.0; exit 3", "DOES NOT HOLD: the command ended with 3"),
    ):
        with pytest.raises(CosmosPosttrainError, match="1 of 1 figures do not hold here: one"):
            run([figure_of(command, near)], config)
        assert said in capfd.readouterr().out
    assert Value("x", "", at_least=2).holds(2) and not Value("x", "", at_least=2).holds(1.9)
    assert Value("x", "", at_most=2).holds(2) and not Value("x", "", at_most=2).holds(2.1)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no figure 'nobody'; use LIST, or tokenizer_sp"):
        choose(FIGURES, ["nobody"])
    wanting = figure_of("echo {videos}", needs="--videos, a folder")
    with pytest.raises(ConfigError, match="--videos is missing: one needs --videos, a folder"):
        run([wanting], ReproduceConfig(str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_the_command_lists_everything() -> None:
    done = run_script(["-m", "cosmos_posttrain.reproduce", "LIST"], timeout_seconds=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == table(FIGURES)
    done = run_script(["-m", "cosmos_posttrain.reproduce"], timeout_seconds=120)
    assert done.returncode == 2 and "a name is missing; use LIST" in done.stderr
