"""Which library reads and writes video, and what is said where it cannot."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest
import torch

from cosmos_posttrain.errors import UserError
from cosmos_posttrain.video import (
    check_writing,
    choice,
    decoder_label,
    probe,
    read_clips,
    write_mp4,
)

NEEDS_NO_TORCHCODEC = pytest.mark.skipif(
    importlib.util.find_spec("torchcodec") is not None, reason="torchcodec is installed"
)
# What torchcodec 0.13 says without FFmpeg's libraries, shortened.
BROKEN = """
raise RuntimeError('''Could not load libtorchcodec. Likely causes:
          1. FFmpeg is not properly installed in your environment.
''')
"""


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choice.loaded.cache_clear()
    yield
    choice.loaded.cache_clear()


def test_pyav_comes_first_and_says_its_versions():
    import av

    assert choice.decoder_name() == "pyav"
    assert decoder_label() == f"pyav {av.__version__} (FFmpeg {av.ffmpeg_version_info})"


@NEEDS_NO_TORCHCODEC
def test_what_is_asked_for_and_missing_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv(choice.VARIABLE, "torchcodec")
    with pytest.raises(UserError, match="is not installed: pip install torchcodec"):
        probe(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="not installed"):
        write_mp4(tmp_path / "a.mp4", torch.zeros(3, 1, 16, 16, dtype=torch.uint8), 10)
    monkeypatch.setenv(choice.VARIABLE, "opencv")
    with pytest.raises(UserError, match=r"'opencv'; it may be pyav or torchcodec\."):
        read_clips(tmp_path / "a.mp4", [0], 1, 16, 16)
    assert list(tmp_path.iterdir()) == []


def test_nothing_that_reads_video_is_one_sentence(monkeypatch):
    monkeypatch.setattr(choice, "MODULES", {"pyav": "no_such_av", "torchcodec": "no_such_codec"})
    with pytest.raises(UserError, match=r"install PyAV \(pip install av\)"):
        choice.chosen()


@NEEDS_NO_TORCHCODEC
@pytest.mark.parametrize("source", [BROKEN, "import libc10_of_another_build"])
def test_a_torchcodec_that_cannot_be_loaded_is_one_sentence(monkeypatch, tmp_path, source):
    """Without PyAV it is taken because it is installed, and its own 40 lines are not shown."""
    monkeypatch.setitem(choice.MODULES, "pyav", "no_such_av")
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec/__init__.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert choice.decoder_name() == "torchcodec"
    with pytest.raises(UserError, match="needs FFmpeg's shared libraries") as caught:
        choice.chosen()
    assert "\n" not in str(caught.value)


@NEEDS_NO_TORCHCODEC
@pytest.mark.parametrize(("has_version", "fields"), [(False, "rotation"), (True, "fps")])
def test_a_torchcodec_that_is_too_old_is_one_sentence(monkeypatch, tmp_path, has_version, fields):
    """0.8 does not say FFmpeg's version, 0.10 nothing of rotation: no video could be read."""
    monkeypatch.setitem(choice.MODULES, "pyav", "no_such_av")
    (tmp_path / "torchcodec").mkdir()
    line = "ffmpeg_major_version = 5" if has_version else ""
    (tmp_path / "torchcodec/__init__.py").write_text(line)
    (tmp_path / "torchcodec/decoders.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass VideoStreamMetadata:\n"
        f"    {fields}: float\n"
    )
    (tmp_path / "torchcodec-0.10.0.dist-info").mkdir()
    (tmp_path / "torchcodec-0.10.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchcodec\nVersion: 0.10.0\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(UserError, match=r"torchcodec 0\.10\.0 is too old .* 0\.11 or newer"):
        choice.chosen()


def test_without_an_h264_encoder_is_said_before_anything_is_computed(monkeypatch):
    import av

    check_writing()

    def unknown(name, mode):
        raise av.codec.codec.UnknownCodecError(name)

    monkeypatch.setattr(av, "Codec", unknown)
    with pytest.raises(UserError, match=r"no mp4 can be written by pyav .*built without libx264"):
        check_writing()
