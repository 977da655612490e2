"""What the doctor finds installed, and what it says of what is missing or was not tried."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import zipfile
from pathlib import Path

import pytest
from helpers.distributed_run import REPOSITORY_DIR
from helpers.stub_packages import write_stub

from cosmos_posttrain import installation
from cosmos_posttrain.installation import Installed, megatron_advice, minor_of, parts
from cosmos_posttrain.video import choice, decoder_label


def found() -> dict[str, Installed]:
    return {part.name: part for part in parts()}


def pretend(folder: Path, monkeypatch: pytest.MonkeyPatch, *packages: tuple[str, str]) -> None:
    """Puts packages of these versions before those that are really there, to pip as to us."""
    for name, version in packages:
        with zipfile.ZipFile(write_stub(folder, name, version)) as wheel:
            wheel.extractall(folder / "site")
    monkeypatch.syspath_prepend(folder / "site")


def test_every_part_has_its_version_or_advice():
    rows = found()
    for name in ("torch", "numpy", "megatron-core"):
        assert rows[name] == Installed(name, importlib.metadata.version(name), rows[name].advice)
    assert rows["PyAV"] == Installed("PyAV", importlib.metadata.version("av"))
    assert rows["videos are read by"] == Installed("videos are read by", decoder_label())
    optional = "transformer-engine apex torchcodec nemo_toolkit nemo_run megatron-bridge".split()
    for name in optional:
        assert (rows[name].version == "not installed") <= bool(rows[name].advice), name


def test_the_tried_versions_are_those_of_the_documents_table():
    text = (REPOSITORY_DIR / "docs/versions.md").read_text()
    rows = re.findall(r"^\| 3\.\d+ \| (\d+\.\d+)\.\d+ \|", text, re.M)
    assert {minor_of(version) for version in rows} == set(installation.TRIED_MEGATRON)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.15.3", ""),
        ("0.15.0rc7", ""),
        ("0.18.0+5fa4a5b", ""),
        ("0.14.1", "too old: 0.15 or newer is needed"),
        ("0.20.0rc0.dev1", "not tried: 0.15 to 0.19 are"),
        ("1", "not tried: 0.15 to 0.19 are"),
    ],
)
def test_advice_on_megatron_core(version, words):
    assert megatron_advice(version) == words


def test_an_image_of_other_versions(monkeypatch, tmp_path):
    image = ("torch", "2.5.0a0+b465a5843b.nv24.9"), ("megatron-core", "0.20.0rc1")
    pretend(tmp_path, monkeypatch, *image, ("transformer-engine", "2.14.0"))
    rows = found()
    assert rows["torch"] == Installed("torch", image[0][1], "2.6 or newer is needed")
    assert rows["megatron-core"].advice.startswith("not tried")
    assert rows["transformer-engine"] == Installed("transformer-engine", "2.14.0")
    if rows["triton"].version == "not installed":
        assert rows["triton"].advice == "megatron-core imports it from 0.19 on: pip install triton"


@pytest.mark.skipif(
    importlib.util.find_spec("torchcodec") is not None, reason="torchcodec is installed"
)
def test_a_torchcodec_without_ffmpeg_says_what_it_needs(monkeypatch, tmp_path):
    monkeypatch.setitem(choice.MODULES, "pyav", "no_such_av")
    pretend(tmp_path, monkeypatch, ("torchcodec", "0.13.0"))
    (tmp_path / "site/torchcodec").mkdir()
    (tmp_path / "site/torchcodec/__init__.py").write_text("raise RuntimeError('no libavutil')")
    rows = found()
    assert "needs FFmpeg's shared libraries" in rows["torchcodec"].advice
    assert rows["videos are read by"].version == "nothing"
