"""``evaluate.py report`` without a browser: what stands on the page, its size, what is refused."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.distributed_run import run_script
from helpers.prepared import make_videos, prepare_small
from helpers.report_case import write_generation, write_loss, write_run
from helpers.run_case import make_config
from helpers.run_case import run as train

from cosmos_posttrain import files
from cosmos_posttrain.errors import ConfigError, OutputFolderError, UserError
from cosmos_posttrain.evaluation.config.report import ReportConfig
from cosmos_posttrain.evaluation.report import command
from cosmos_posttrain.evaluation.report.charts import HeatMaps, Line, LineChart, short
from cosmos_posttrain.evaluation.report.curves import (
    LOSS,
    MAX_POINTS,
    VALIDATION,
    Curve,
    read_curves,
)
from cosmos_posttrain.evaluation.report.shapes import grid, scalars, series, split
from cosmos_posttrain.evaluation.report.tables import number

MEGABYTE = 1_000_000


class Reader(HTMLParser):
    """Text, ids and addresses of a page; fails on elements that are not closed in order."""

    EMPTY = frozenset("area base br col embed hr img input link meta source track wbr".split())

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.tags.append(tag)
        for name, value in attrs:
            self.attributes.add(name)
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "poster", "xlink:href", "data", "action", "srcset"):
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def report(*runs: Path, **changes: Any) -> tuple[Reader, str]:
    """Writes the page and reads it again."""
    config = ReportConfig(run=[str(run) for run in runs], **changes)
    path = command.run(config)
    assert path == config.page
    html = path.read_text(encoding="utf-8")
    return Reader(html), html


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, in a current folder without evaluations."""
    monkeypatch.chdir(tmp_path)
    return write_run(tmp_path / "swap")


def test_the_whole_page(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_loss(run / "evaluation" / "loss", run)
    write_generation(run / "evaluation" / "generate", run)
    page, html = report(run)
    assert len(html.encode()) < MEGABYTE and "3 clips" in capsys.readouterr().out
    assert all(re.match(r"#|data:", address) for address in page.addresses), page.addresses
    assert len(page.ids) == len(set(page.ids))
    assert "default-src 'none'" in html and page.tags.count("video") == 9
    for said in (
        "from old-tokenizer (8x16x16) to new-tokenizer (4x8x8)",
        "4.100 nats (5.92 bits) per token on held-out clips, 1.44 bits below the best baseline "
        "(bigram, 5.100 nats)",
        "21.00 dB of PSNR, 1.50 dB above the best guess without a model; the tokenizer itself "
        "reaches 25.00 dB",
        "1 of 3 clips were flagged by a detector",
        "solid color from frame 12 on",
        "has not risen again",
        "python train_general.py --max_steps 200",
        "python evaluate.py loss",
        "17 frames of 160x96, 5x12x20 = 1,200 tokens",
        "Loss by latent frame",
        "Loss by place",
        "optimizer.lr 0.001",
    ):
        assert said in page.text, said
    names = re.findall(r'<h3 id="clip-\d+">(\w+)<', html)
    assert names == ["broken", "fast", "calm"]  # the failure, then the lowest PSNR


@pytest.mark.parametrize("parts", [(), ("loss",), ("generate",)])
def test_any_evaluation_may_be_missing(run: Path, parts: tuple[str, ...]) -> None:
    if "loss" in parts:
        write_loss(run / "loss", run)
    if "generate" in parts:
        write_generation(run / "generate", run)
    page, _ = report(run)
    missing = [name for name in ("loss", "generate") if name not in parts]
    for name in missing:
        assert f"python evaluate.py {name} --data_path prepared --ar_model_dir" in page.text
    assert page.text.count("Not measured") == len(missing)
    assert ("Sample clips" in page.text) == ("generate" in parts)


def test_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "fresh", num_steps=50, final_loss=5.0)
    page, html = report(run, other, output=str(tmp_path / "both.html"), title="Two runs")
    assert "Two runs" in page.text and "swap: training" in page.text
    assert "fresh: validation" in page.text
    changed = re.findall(r'<th scope="row">([\w.]+)</th>\s*<td class="changed"', html)
    assert {"max_steps", "log_dir"} <= set(changed) and "optimizer.lr" not in changed


def test_evaluations_are_found_where_the_commands_write_them(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other")
    write_loss(tmp_path / "evaluation" / "loss" / "swap", run, nats=4.25)
    write_loss(tmp_path / "evaluation" / "loss" / "other", other, nats=4.75)
    # What a checkpoint keeps of its last step is no evaluation.
    newest = next((run / "default" / "checkpoints").iterdir())
    files.write_json(newest / "context" / "metrics.json", {"command": "none", "step": 1})
    page, _ = report(run)
    assert "4.250 nats" in page.text and "4.750 nats" not in page.text
    page, _ = report(run, evaluation=[str(tmp_path / "evaluation" / "loss" / "other")])
    assert "4.750 nats" in page.text and "4.250 nats" not in page.text
    (tmp_path / "evaluation" / "loss" / "other" / "metrics.json").rename(tmp_path / "mine.json")
    page, _ = report(run, evaluation=[str(tmp_path / "mine.json")])
    assert "4.750 nats" in page.text


def test_text_from_files_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = '"><script>alert(1)<'
    run = write_run(tmp_path / '<img src=x onerror=alert(2)>&"$x_1$')
    write_generation(run / "evaluation", run, names=['"><script>alert(3)', "plain"])
    folder = write_loss(run / "loss", run)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["settings"][evil] = evil
    metrics["figures"]["baselines"][evil + "$\\frac{"] = metrics["figures"]["baselines"]["bigram"]
    metrics["rows"][0]["source"] = evil
    metrics["failures"] = [{"clip": evil, "error": evil}]
    metrics["environment"]["command_line"] = [evil]
    files.write_json(folder / "metrics.json", metrics)
    unknown = run / "unknown"
    unknown.mkdir()
    files.write_json(unknown / "metrics.json", {"command": evil, "figures": {evil: {evil: 1}}})
    page, _ = report(run)
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert "alert(1)" in page.text and "alert(2)" in page.text and "alert(3)" in page.text
    assert not {name for name in page.attributes if name.startswith("on")}


def test_figures_of_any_shape(run: Path) -> None:
    figures = {
        "psnr": None,
        "nats_per_token": "low",
        "per_latent_frame": [None, "x"],
        "per_position": [[1, 2], [3]],
        "baselines": [1],
        "deep": {"a": {"psnr": 20.0}, "b": {"psnr": 21}, "list": [1, 2, 3]},
        "numbers": {"lpips": [0.1, None, 0.3]},
    }
    for name in ("loss", "generate", "future"):
        (run / name).mkdir()
        metrics = {"command": name, "figures": figures, "rows": ["x", {"clip": 1}], "failures": 3}
        files.write_json(run / name / "metrics.json", metrics)
    page, _ = report(run)
    assert "The evaluation has no mean loss." in page.text
    assert "evaluate.py future" in page.text and "LPIPS by frame" in page.text


def test_the_first_evaluations_are_read_too(run: Path) -> None:
    (run / "tokenizer").mkdir()
    metrics = {
        "settings": {"command": "tokenizer", "tokenizer": {"id": "tiny"}},
        "psnr": 25.7,
        "ssim": 0.72,
        "num_failures": 1,
        "measured_with": {"device": "cpu"},
        "videos": [{"video": "0.mp4", "psnr": 23.8}],
        "failures": [{"video": "1.mp4", "error": "1.mp4 is cut off"}],
    }
    files.write_json(run / "tokenizer" / "metrics.json", metrics)
    page, _ = report(run)
    assert "The tokenizer alone" in page.text and "25.70" in page.text
    assert "1 could not be evaluated" in page.text and "1.mp4 is cut off" in page.text


def test_the_page_stays_small(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"clip{number}" for number in range(4)]
    folder = write_generation(run / "generate", run, names=[*names, "broken"])
    page, _ = report(run, max_clips=2)
    assert page.tags.count("video") == 6 and "3 further clip(s) were left out" in page.text
    for film in (folder / "clips").glob("clip*/truth.mp4"):  # players ignore what follows the end
        film.write_bytes(film.read_bytes() + b"\0\0\0\0" * 250_000)
    capsys.readouterr()
    page, html = report(run, max_megabytes=2.5)
    assert len(html.encode()) <= 2.5 * MEGABYTE
    assert page.tags.count("video") == 6 and "3 further clip(s) were left out" in page.text
    assert "2 clips, 3 left out (--max_clips, --max_megabytes)" in capsys.readouterr().out


def test_a_clip_that_cannot_be_read_is_named(run: Path) -> None:
    folder = write_generation(run / "generate", run)
    (folder / "clips" / "calm" / "truth.mp4").write_bytes(b"no video")
    page, _ = report(run)
    assert page.tags.count("video") == 6
    assert re.search(r"Not shown: \S*calm/truth.mp4 ", page.text)


def test_a_run_that_memorises_is_said_to(run: Path) -> None:
    path = run / "default" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[-1]["val_loss"] = 9.0
    rows[-2] |= {"reduced_train_loss": None, "grad_norm": float("inf")}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 200, "reduced')
    page, _ = report(run)
    assert "to 9.000 at step 200: the model has begun to memorise" in page.text


def test_a_real_run_names_the_command_that_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "videos").mkdir()
    prepare_small(make_videos(tmp_path / "videos"), tmp_path / "tokens")
    train(make_config(tmp_path / "tokens", tmp_path / "a run", max_steps=4))
    said = capsys.readouterr().out
    assert f"python evaluate.py report --run '{tmp_path / 'a run'}'" in said
    page, _ = report(tmp_path / "a run" / "default")
    assert "none: fresh weights" in page.text and "random:tiny" in page.text
    assert "block-mean" in page.text and "1 process, torch" in page.text
    assert (tmp_path / "a run" / "default" / "report.html").is_file()


def _no_metrics(run: Path) -> None:
    (run / "default" / "metrics.jsonl").unlink()


def _no_checkpoint(run: Path) -> None:
    for checkpoint in (run / "default" / "checkpoints").iterdir():
        files.remove(checkpoint)


def _no_steps(run: Path) -> None:
    (run / "default" / "metrics.jsonl").write_text('{"step": ')


def _damaged_data(run: Path) -> None:
    next(run.glob("default/checkpoints/*/context/data.json")).write_text("{")


def _damaged_evaluation(run: Path) -> None:
    (run / "loss").mkdir()
    (run / "loss" / "metrics.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_no_metrics, r"holds no training run \(no default/metrics.jsonl\)"),
        (_no_checkpoint, "has no complete checkpoint yet"),
        (_no_steps, "has no finished step yet"),
        (_damaged_data, "data.json is damaged"),
        (_damaged_evaluation, "metrics.json is damaged: it is not JSON"),
    ],
)
def test_what_is_no_run_is_refused(run: Path, damage: Any, said: str) -> None:
    damage(run)
    with pytest.raises(UserError, match=said):
        report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": []}, "--run is missing"),
        ({"run": ["a", "a"]}, "--run names the same folder twice"),
        ({"run": list("abcdefg")}, "--run was given 7 times"),
        ({"run": ["a"], "output": "page.pdf", "max_clips": -1}, "must end in .html"),
        ({"run": ["a"], "max_megabytes": 0.1}, "--max_megabytes 0.1 must be at least 2"),
        ({"run": ["a"], "wandb": True}, "set WANDB_API_KEY"),
        ({"run": ["absent"]}, "absent holds no training run"),
    ],
)
def test_bad_settings_are_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        command.run(ReportConfig(**changes))


def test_an_evaluation_that_was_named_must_be_one(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty holds no metrics\.json"):
        report(run, evaluation=[str(tmp_path / "empty")])
    files.write_json(tmp_path / "other.json", {"step": 1})
    with pytest.raises(ConfigError, match=r"other\.json is no result of an evaluation"):
        report(run, evaluation=[str(tmp_path / "other.json")])
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OutputFolderError, match="is a folder"):
        report(run, output=str(tmp_path / "page.html"))


def test_the_script_ends_with_2(tmp_path: Path) -> None:
    finished = run_script(["evaluate.py", "report", "--run", str(tmp_path)], timeout_seconds=120)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr.startswith("error: --run") and finished.stderr.count("\n") == 1


# The parts.


def test_long_runs_are_thinned(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(20_000):
            file.write(f'{{"step": {step}, "reduced_train_loss": {step % 2}}}\n')
    curves = read_curves(path)
    assert (curves.num_steps, curves.consumed_samples, len(curves.of[VALIDATION])) == (
        20_000,
        None,
        0,
    )
    thin = curves.of[LOSS].thinned()
    assert len(thin) == MAX_POINTS
    assert np.abs(thin.values - 0.5).max() < 0.02 and 1 < thin.steps[0] < 30
    assert thin.steps[-1] > 19_970


def test_smoothing_keeps_ends_and_straight_lines() -> None:
    steps = np.arange(1, 91, dtype=np.float64)
    line = Curve(steps, 2 * steps).smoothed()
    np.testing.assert_allclose(line.values, 2 * steps)
    noisy = Curve(steps, np.where(steps % 2, 1.0, -1.0)).smoothed()
    assert noisy.values[0] == 1 and np.abs(noisy.values[3:-3]).max() <= 1 / 7 + 1e-12


def test_pictures_take_their_colours_from_the_page() -> None:
    line = Line("<b>", np.arange(5.0), np.arange(5.0), 1, "dots")
    charts = [
        LineChart("one", "A & B", "x", "y", [line, Line("", [1, 2], [1, 500], 2)], "d", True),
        LineChart("two", "A & B", "x", "y", [line], "d"),
        HeatMaps("three", "Maps", "nats", [("<&$^$", np.eye(3)), ("b", np.eye(3) / 2)], "d"),
    ]
    svgs = [str(chart.svg()) for chart in charts]
    assert len(Reader("".join(svgs)).ids) == len(set(Reader("".join(svgs)).ids))
    for svg in svgs:
        assert svg.startswith("<svg viewBox=") and "#0a0" not in svg and "font-family" not in svg
    assert "var(--series-1)" in svgs[0] and "&lt;&amp;" in svgs[2]
    assert not re.findall(r"#[0-9a-f]{6}\b", svgs[0])
    for chart in charts:
        pixels = chart.png()
        assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
        assert tuple(pixels[0, 0]) == (255, 255, 255) and pixels.min() < 150


def test_numbers_have_four_digits() -> None:
    given = [0, 12, 1234567, 21.0, 0.1234567, 12.3456, 999.96, 2345.6, -1.5, 1e-5, float("nan")]
    minus, dash = "\N{MINUS SIGN}", "\N{EM DASH}"
    expected = [
        "0",
        "12",
        "1,234,567",
        "21.00",
        "0.1235",
        "12.35",
        "1,000.0",
        "2,346",
        f"{minus}1.500",
    ]
    assert [number(value) for value in given] == [*expected, f"1e{minus}05", dash]
    assert [short(v) for v in (0.0, 0.25, 2.5e-5, 1200.0)] == ["0", "0.25", "2.5e-5", "1,200"]


def test_figures_are_found_by_their_paths() -> None:
    figures = {"a": {"psnr": 1, "per_frame": {"psnr": [1, None]}}, "psnr": {"b": True, "c": 2.5}}
    assert scalars(figures) == {("a", "psnr"): 1.0, ("psnr", "c"): 2.5}
    ((path, values),) = series(figures).items()
    assert split(path) == ("a", "psnr") and values[0] == 1 and np.isnan(values[1])
    assert split(("psnr", "c")) == ("c", "psnr") and split(("x", "y")) == ("x", "y")
    assert grid([[1, None], [2, 3]]) is not None and grid([[1], [1, 2]]) is None


def test_the_same_goes_to_wandb(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write_generation(run / "generate", run, names=["only"])
    report(run, wandb=True)
    (session,) = (run / "default" / "wandb").glob("offline-run-*")
    names = [path.name for path in (session / "files" / "media").rglob("*") if path.is_file()]
    assert sum(name.endswith(".mp4") for name in names) == 3
    assert sum(name.endswith(".png") for name in names) == 5  # four of the training, PSNR by frame
    assert sum(name.endswith(".html") for name in names) == 1
