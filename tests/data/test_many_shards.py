"""Data sets of very many shards: a bounded number of open files, and little memory for each."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import pickle
import subprocess
import sys
import time

import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR
from helpers.prepared import make_videos, prepare_small, write_data_set
from torch.utils.data import DataLoader

from cosmos_posttrain.data import Manifest, TokenDataset, limits, prepared
from cosmos_posttrain.data.manifest import Failure
from cosmos_posttrain.data.pool import POOL
from cosmos_posttrain.data.serial import to_plain
from cosmos_posttrain.data.shard_table import ShardInfo, ShardTable
from cosmos_posttrain.errors import DatasetError


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("many") / "data", 300)


def run_limited(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own that may have 256 files open."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))\n"
    return subprocess.run(
        [sys.executable, "-c", limit + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY_DIR)},
        capture_output=True,
        text=True,
        timeout=120,
    )


READ_TWO_SPLITS = """
import os, sys
from cosmos_posttrain.data import TokenDataset
train = TokenDataset(sys.argv[1], "train", "8,1,1")
validation = TokenDataset(sys.argv[1], "validation", "8,1,1")
most = 0
for data in (train, validation, train.other_split("test")):
    for number in range(len(data)):
        data[number]
        most = max(most, len(os.listdir("/proc/self/fd")))
print(len(train), len(validation), most)
"""


def test_300_shards_are_read_where_256_files_may_be_open(many):
    result = run_limited(READ_TWO_SPLITS, many)
    assert result.returncode == 0, result.stderr
    num_train, num_validation, most = map(int, result.stdout.split())
    assert (num_train, num_validation) == (480, 60)
    assert 64 <= most < 128  # 32 shards of two files, and what Python has open anyway


USE_UP_ALL_FILES = """
import os, sys
from cosmos_posttrain.data import TokenDataset
from cosmos_posttrain.errors import UserError
data = TokenDataset(sys.argv[1], "all")
expected = data[40].tolist()
for number in range(20):
    data[number]
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
assert data[40].tolist() == expected  # the pool gives up what it has open
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
from cosmos_posttrain.data.pool import POOL
POOL.close(lambda key: True)
while True:
    try:
        held.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        break
for act in (lambda: data[80], lambda: data.row(80), lambda: TokenDataset(sys.argv[2])):
    try:
        act()
    except UserError as error:
        print(error)
"""


def test_too_many_open_files_has_its_own_sentence(many, tmp_path):
    other = write_data_set(tmp_path / "other", 1)
    result = run_limited(USE_UP_ALL_FILES, many, other)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3, result.stdout
    for line in lines:
        assert "all 256 files that this process may have open" in line
        assert "ulimit -n" in line and "damaged" not in line


def test_open_shards_are_bounded_shared_and_closed(many, monkeypatch):
    monkeypatch.setattr(limits, "_MAX_OPEN_SHARDS", 5)
    POOL.close(lambda key: True)
    train = TokenDataset(many, "train", "8,1,1")
    validation = TokenDataset(many, "validation", "8,1,1")
    test = train.other_split("test")
    assert train._documents is validation._documents is test._documents
    assert sorted(n for d in (train, validation, test) for n in d.indices) == list(range(600))
    for number in range(60):
        train[number], validation[number]
    assert len(POOL) == 5
    del train, validation, test
    gc.collect()
    assert len(POOL) == 0


def test_a_folder_that_is_prepared_anew_is_read_anew(tmp_path):
    videos = make_videos(tmp_path / "videos", 3)
    prepare_small(videos, tmp_path / "out")
    before = TokenDataset(tmp_path / "out", "all")
    assert len(before[0]) == 18
    prepare_small(videos, tmp_path / "out", height=24, overwrite=True)
    after = TokenDataset(tmp_path / "out", "all")
    assert len(after[0]) == 27
    assert len(before[0]) == 18  # the files that it has open
    with pytest.raises(DatasetError, match="is damaged"):
        before[4]


def test_workers_of_a_loader_read_the_same(many):
    data = TokenDataset(many, "test", "8,1,1")
    data[0]
    alone = torch.stack([data[number] for number in range(len(data))])
    together = torch.cat(list(DataLoader(data, 7, num_workers=2)))
    assert torch.equal(alone, together)


def test_a_shard_that_shrinks_while_it_is_open_is_an_error_and_no_crash(tmp_path):
    folder = write_data_set(tmp_path / "data", 1, num_documents=4)
    data = TokenDataset(folder, "all")
    data[0]
    os.truncate(folder / "shard-00000.bin", 40)
    with pytest.raises(DatasetError, match=r"shard-00000.bin is damaged: it ends before byte 144"):
        data[3]


def test_the_index_of_sources_says_what_the_sidecars_say(many, tmp_path, monkeypatch):
    data = TokenDataset(many, "train", "8,1,1")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in many.iterdir():
        if path.name != "sources.npz":
            (copy / path.name).hardlink_to(path)
    assert TokenDataset(copy, "train", "8,1,1").indices.tolist() == data.indices.tolist()
    other = write_data_set(tmp_path / "other", 2)
    (copy / "sources.npz").write_bytes((other / "sources.npz").read_bytes())
    os.utime(copy / "manifest.json")  # so that it is opened anew
    assert TokenDataset(copy, "train", "8,1,1").indices.tolist() == data.indices.tolist()
    whole = (many / "sources.npz").read_bytes()
    for damage in (b"", whole[:-30], whole[:200] + b"x" + whole[201:], b"text"):
        (copy / "sources.npz").write_bytes(damage)
        os.utime(copy / "manifest.json")
        with pytest.raises(DatasetError, match=r"sources.npz is damaged.*delete it"):
            TokenDataset(copy, "train", "8,1,1")
    monkeypatch.setattr(prepared, "load_runs", None)  # nobody looks where nobody needs it
    assert len(TokenDataset(copy, "all")) == 600
    assert len(TokenDataset(copy, "train", "1,0,0")) == 600


def table_of(num_shards: int) -> ShardTable:
    def files(shard: int) -> dict[str, dict[str, object]]:
        if shard % 1000 == 7:  # no video could be read
            return {}
        sha256 = f"{shard:064x}"
        return {e: {"sha256": sha256, "num_bytes": 1000 + shard} for e in ("bin", "idx", "jsonl")}

    return ShardTable(
        ShardInfo(f"shard-{n:05d}", 64 if files(n) else 0, 64 if files(n) else 0, files(n))
        for n in range(num_shards)
    )


def test_large_manifests_are_quick_and_small(many, tmp_path):
    """A fifth of ten million clips in a fifth of five seconds."""
    num_shards = 156_250 // 5
    table = table_of(num_shards)
    num_documents = int(table.num_documents.sum())
    manifest = dataclasses.replace(Manifest.load(many), shards=table, num_documents=num_documents)
    start = time.process_time()
    manifest.save(tmp_path)
    saved = time.process_time()
    assert Manifest.load(tmp_path) == manifest
    assert saved - start < 1 and time.process_time() - saved < 1
    assert len(pickle.dumps(table)) / num_shards < 200


def test_the_text_of_a_manifest_is_that_of_json(many, tmp_path):
    manifest = dataclasses.replace(
        Manifest.load(many),
        plan={"note": 'text "shards": []\n  "shards": []', "é": [1, None]},
        failures=(Failure("ü.mp4", 'a "reason"'),),
        num_failures=1,
    )
    for shards in (table_of(9), ShardTable()):
        for rejected in ({}, {"too dark": 3}):
            value = dataclasses.replace(manifest, shards=shards, rejected=rejected)
            value.save(tmp_path)
            plain = to_plain(value)
            del plain["prompts"], plain["num_unserved"]  # base manifests of clips have none
            if not rejected:
                del plain["rejected"]  # manifests without any are those of the first version
            expected = json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
            assert (tmp_path / "manifest.json").read_text() == expected


def test_a_fingerprint_is_that_of_the_first_version(many):
    manifest = dataclasses.replace(Manifest.load(many), shards=table_of(9))
    hashes = [{k: f["sha256"] for k, f in shard.files.items()} for shard in manifest.shards]
    value = {"contract": to_plain(manifest.contract), "shards": hashes}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    assert manifest.fingerprint == hashlib.sha256(text.encode()).hexdigest()
