"""A data set says what decoded its videos, and nothing else goes on with it."""

from __future__ import annotations

import json

import pytest
from helpers.prepared import BlockMean, config, make_videos, prepare_small

from cosmos_posttrain.data import Manifest
from cosmos_posttrain.data.config import InfoConfig
from cosmos_posttrain.data.info import info
from cosmos_posttrain.errors import OutputFolderError, UserError, VideoError
from cosmos_posttrain.prepare import runners
from cosmos_posttrain.prepare.prepare import Preparation, PreparationEncoders, prepare
from cosmos_posttrain.video import choice, decoder_label

OTHER = "torchcodec 0.13.0 (FFmpeg 5)"


class _Stop(Exception):
    pass


class _StopsAtOnce(BlockMean):
    def encode(self, video):
        raise _Stop


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return make_videos(tmp_path_factory.mktemp("videos"), num_videos=2)


@pytest.fixture
def begun(videos, tmp_path):
    """A folder whose preparation was stopped."""
    with pytest.raises(_Stop):
        prepare(config(videos, tmp_path / "out"), _StopsAtOnce())
    return tmp_path / "out"


def broken(name):
    raise UserError(f"{name} cannot be loaded.")


def record(folder, decoder):
    """Makes a folder one that another decoder began; None: an earlier version of this program."""
    path = folder / ("manifest.json" if (folder / "manifest.json").exists() else "prepare.json")
    value = json.loads(path.read_text())
    if decoder is None:
        del value["plan"]["decoder"]
    else:
        value["plan"]["decoder"] = decoder
    path.write_text(json.dumps(value))


def test_the_manifest_says_what_decoded(videos, tmp_path, capsys):
    manifest = prepare_small(videos, tmp_path / "out")
    assert manifest.plan["decoder"] == decoder_label()
    info(InfoConfig(str(tmp_path / "out")))
    assert f"decoded by {decoder_label()}" in capsys.readouterr().out


def test_another_library_does_not_go_on(videos, begun):
    record(begun, OTHER)
    before = (begun / "prepare.json").read_bytes()
    with pytest.raises(OutputFolderError, match="decoded by torchcodec") as caught:
        prepare_small(videos, begun)
    assert "would give other tokens; go on where" in str(caught.value)
    assert (begun / "prepare.json").read_bytes() == before
    manifest = prepare_small(videos, begun, overwrite=True)
    assert manifest.plan["decoder"] == decoder_label()


def test_another_version_goes_on_and_is_recorded_too(videos, begun, capsys):
    record(begun, "pyav 15.0.0 (FFmpeg 7.1)")
    with pytest.raises(_Stop):  # stopped once more: recorded once
        prepare(config(videos, begun), _StopsAtOnce())
    assert "what pyav 15.0.0 (FFmpeg 7.1) began" in capsys.readouterr().err
    manifest = prepare_small(videos, begun)
    assert manifest.plan["decoder"] == f"pyav 15.0.0 (FFmpeg 7.1), {decoder_label()}"


def test_folders_of_earlier_versions_go_on_and_are_read(videos, begun):
    record(begun, None)
    manifest = prepare_small(videos, begun)
    assert manifest.plan["decoder"] == f"pyav (version not recorded), {decoder_label()}"
    record(begun, None)
    assert Manifest.load(begun).fingerprint == manifest.fingerprint
    assert prepare_small(videos, begun).num_documents == manifest.num_documents


def test_what_is_complete_stays_complete(videos, tmp_path, capsys):
    """Nothing is decoded, so nothing is refused: the next step of a script may go on."""
    prepare_small(videos, tmp_path / "out")
    record(tmp_path / "out", OTHER)
    capsys.readouterr()
    prepare_small(videos, tmp_path / "out")
    assert f"decoded by {OTHER}; nothing to do" in capsys.readouterr().out


def test_a_rank_with_another_library_is_refused(videos, tmp_path, monkeypatch):
    """Rank 0 dealt the jobs where there is PyAV; here there is torchcodec alone."""
    settings = config(videos, tmp_path / "out")
    jobs = Preparation(settings, PreparationEncoders(settings, BlockMean(), None)).start()
    monkeypatch.setitem(choice.MODULES, "pyav", "no_such_av")
    monkeypatch.setitem(choice.MODULES, "torchcodec", "json")  # some module that is installed
    with pytest.raises(UserError, match="decodes with torchcodec, the first one with pyav"):
        runners.check_decoder(jobs)


def test_what_cannot_be_loaded_ends_the_run(videos, tmp_path, monkeypatch):
    """Installed on this rank and broken: not the videos' fault, so none is recorded as failed."""
    settings = config(videos, tmp_path / "out")
    jobs = Preparation(settings, PreparationEncoders(settings, BlockMean(), None)).start()
    monkeypatch.setattr(choice, "loaded", broken)
    with pytest.raises(UserError, match=r"\(rank 0\) cannot decode: pyav cannot be loaded"):
        runners.check_decoder(jobs)
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        runners.run_jobs(jobs, BlockMean(), 1)
    assert not isinstance(caught.value, VideoError)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_rank_is_asked_before_its_encoders_are_loaded(videos, tmp_path, monkeypatch):
    start = Preparation.start

    def started(self):
        """As on rank 0; from then on as on another machine, where nothing can be loaded."""
        jobs = start(self)
        monkeypatch.setattr(choice, "loaded", broken)
        monkeypatch.setattr(PreparationEncoders, "tokenizer", lambda self: pytest.fail("loaded"))
        return jobs

    monkeypatch.setattr(Preparation, "start", started)
    with pytest.raises(UserError, match="cannot decode"):
        prepare_small(videos, tmp_path / "out")


def test_without_a_decoder_nothing_is_written(videos, tmp_path, monkeypatch):
    """One sentence, not a failure for each video."""
    monkeypatch.setattr(choice, "MODULES", {"pyav": "no_such_av", "torchcodec": "no_such_codec"})
    with pytest.raises(UserError, match="nothing here can read video"):
        prepare_small(videos, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def nothing_decodes(monkeypatch):
    monkeypatch.setattr(choice, "MODULES", {"pyav": "no_such_av", "torchcodec": "no_such_codec"})


def test_what_is_complete_stays_complete_where_nothing_decodes(videos, tmp_path, monkeypatch):
    fingerprint = prepare_small(videos, tmp_path / "out").fingerprint
    nothing_decodes(monkeypatch)
    assert prepare_small(videos, tmp_path / "out").fingerprint == fingerprint
    with pytest.raises(UserError, match="nothing here can read video"):
        prepare_small(videos, tmp_path / "out", overwrite=True)
    assert Manifest.load(tmp_path / "out").fingerprint == fingerprint  # not removed before


def test_killed_before_the_manifest_another_library_finishes(videos, tmp_path, monkeypatch):
    """All shards are there: nothing is decoded, so it is neither refused nor recorded."""

    def stop(self):
        raise _Stop

    with monkeypatch.context() as killed:
        killed.setattr(Preparation, "finish", stop)
        with pytest.raises(_Stop):
            prepare_small(videos, tmp_path / "out")
    record(tmp_path / "out", OTHER)
    assert prepare_small(videos, tmp_path / "out").plan["decoder"] == OTHER
