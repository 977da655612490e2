"""Hashes of the manifest: compared on first use where that is cheap, and all of them by verify."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers.distributed_run import run_script
from helpers.prepared import write_data_set

from cosmos_posttrain.data import Manifest, TokenDataset, recorded
from cosmos_posttrain.data.__main__ import main
from cosmos_posttrain.data.config import VerifyConfig
from cosmos_posttrain.data.shard_table import ShardInfo, ShardTable
from cosmos_posttrain.data.verify import verify
from cosmos_posttrain.errors import ConfigError, DatasetError, PartialFailureError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("whole") / "data", 3)


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "data")
    return tmp_path / "data"


def flip_last_byte(path: Path) -> None:
    """Changes a file, but not its size."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_changed_byte_is_found_when_the_shard_is_first_used(folder):
    flip_last_byte(folder / "shard-00000.bin")
    flip_last_byte(folder / "shard-00001.idx")
    flip_last_byte(folder / "shard-00002.jsonl")
    data = TokenDataset(folder, "all")
    for _ in range(2):  # and again: a shard that was found damaged is not used afterwards
        with pytest.raises(DatasetError, match=r"shard-00000.bin is damaged: its sha256"):
            data[0]
    with pytest.raises(DatasetError, match=r"shard-00001.idx is damaged: its sha256"):
        data[2]
    with pytest.raises(DatasetError, match=r"shard-00002.jsonl is damaged: its sha256"):
        data.row(4)
    assert len(data[5]) == 18 and data.row(0).source == "0/0.mp4"
    (folder / "sources.npz").unlink()
    with pytest.raises(DatasetError, match=r"shard-00002.jsonl is damaged: its sha256"):
        data.other_split("train")


def test_of_large_data_only_verify_reads_all_tokens(folder, monkeypatch):
    monkeypatch.setattr(recorded, "MAX_HASHED_BIN_BYTES", 1)
    flip_last_byte(folder / "shard-00000.bin")
    assert len(TokenDataset(folder, "all")[0]) == 18
    with pytest.raises(PartialFailureError, match="1 files"):
        verify(VerifyConfig(str(folder)))


def test_of_many_shards_sizes_are_compared_on_first_use(folder, monkeypatch):
    monkeypatch.setattr(recorded, "MAX_SHARDS_SIZED_ON_OPENING", 2)
    for extension in ("bin", "idx", "jsonl"):
        path = folder / f"shard-00001.{extension}"
        path.write_bytes(path.read_bytes() + b"more")
    data = TokenDataset(folder, "all")
    with pytest.raises(DatasetError, match=r"shard-00001.bin is damaged: it has \d+ bytes"):
        data[2]
    with pytest.raises(DatasetError, match=r"shard-00001.jsonl is damaged: it has \d+ bytes"):
        data.row(2)
    (folder / "shard-00002.jsonl").unlink()
    os.utime(folder / "manifest.json")  # so that it is opened anew
    with pytest.raises(DatasetError, match=r"shard-00002.jsonl is missing"):
        TokenDataset(folder, "all")


def test_verify_names_every_damaged_file(folder, capsys):
    verify(VerifyConfig(str(folder)))
    assert "9 files of 3 shards are what its manifest says" in capsys.readouterr().out
    flip_last_byte(folder / "shard-00000.bin")
    (folder / "shard-00001.idx").write_bytes(b"short")
    (folder / "shard-00002.jsonl").unlink()
    (folder / "sources.npz").write_bytes(b"")
    with pytest.raises(PartialFailureError, match=r"4 files of .* damaged or missing") as caught:
        verify(VerifyConfig(str(folder), num_workers=1))
    assert caught.value.exit_code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if str(folder) in line]
    words = ("another sha256", "has 5 bytes", "is missing", "sources.npz is damaged")
    assert len(lines) == 4
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_the_commands_from_the_shell(folder):
    module = ["-m", "cosmos_posttrain.data"]
    flip_last_byte(folder / "shard-00002.bin")
    damaged = run_script([*module, "verify", "--data_path", folder])
    assert damaged.returncode == 1 and "shard-00002.bin has another sha256" in damaged.stderr
    absent = run_script([*module, "verify", "--data_path", folder / "nowhere"])
    assert absent.returncode == 2 and absent.stderr.count("\n") == 1


def run_main(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["data", *map(str, arguments)])
    main()


def test_info_prints_contract_and_counts(folder, monkeypatch, capsys):
    run_main(monkeypatch, "info", "--data_path", folder)
    text = capsys.readouterr().out
    for words in ("block-mean", "4x8x8", "9 frames of 24 x 16", "latent shape 3,2,3, uint16"):
        assert words in text
    assert "6 in 3 shards" in text and "6 read, 0 could not be read" in text
    assert Manifest.load(folder).fingerprint in text
    (folder / "shard-00001.bin").unlink()  # the manifest is enough
    run_main(monkeypatch, "info", "--data_path", folder)
    assert capsys.readouterr().out == text
    run_main(monkeypatch, "info", "--data_path", folder / "shard-00000")
    assert "2 of 18 tokens" in capsys.readouterr().out
    run_main(monkeypatch, "--help")
    assert "verify" in capsys.readouterr().out


def test_wrong_commands_are_refused(folder, monkeypatch):
    for arguments in ([], ["merge"], ["--data_path", folder]):
        with pytest.raises(ConfigError, match=r"use python -m .* info or verify"):
            run_main(monkeypatch, *arguments)
    with pytest.raises(ConfigError, match=r"--data_path is missing"):
        run_main(monkeypatch, "info")
    with pytest.raises(ConfigError, match="--num_workers 0 must be at least 1"):
        run_main(monkeypatch, "verify", "--data_path", folder, "num_workers=0")
    with pytest.raises(DatasetError, match="has no manifest"):
        run_main(monkeypatch, "verify", "--data_path", folder.parent)


def _changed(shard: ShardInfo, **changes: object) -> ShardInfo:
    return dataclasses.replace(shard, **changes)  # type: ignore[arg-type]


def test_a_manifest_that_contradicts_itself_is_refused(folder):
    manifest = Manifest.load(folder)
    shards = list(manifest.shards)
    shards[1] = _changed(shards[1], files={k: shards[1].files[k] for k in ("bin", "idx")})
    dataclasses.replace(manifest, shards=ShardTable(shards)).save(folder)
    with pytest.raises(DatasetError, match="the files of shard-00001 do not go with"):
        TokenDataset(folder)
    shards[1] = _changed(manifest.shards[0], num_documents=1)
    changed = dataclasses.replace(manifest, shards=ShardTable(shards), num_documents=5)
    changed.save(folder)
    with pytest.raises(DatasetError, match="the files of shard-00000 do not go with"):
        TokenDataset(folder)
    value = json.loads((folder / "manifest.json").read_text())
    for damage in ("x", {}, {"bin": 3}, {"bin": {"sha256": "ab", "num_bytes": 3}}, None):
        value["shards"][2]["files"] = damage
        if damage == {}:
            value["shards"][2]["name"] = 3
        (folder / "manifest.json").write_text(json.dumps(value))
        with pytest.raises(DatasetError, match="its entry of shard 2 does not fit"):
            TokenDataset(folder)
