"""Reading prepared data: contracts, foreign layouts, damage, splits without leaks."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.prepared import make_videos, prepare_small
from megatron.core.datasets.indexed_dataset import IndexedDataset

from cosmos_posttrain.data import Manifest, TokenDataset
from cosmos_posttrain.data.config import SPLITS
from cosmos_posttrain.data.indexed import ShardReader, ShardWriter, token_dtype
from cosmos_posttrain.data.source_runs import SourceRuns
from cosmos_posttrain.data.splits import split_digests
from cosmos_posttrain.errors import ConfigError, DatasetError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_videos(folder / "videos", 6)
    prepare_small(folder / "videos", folder / "out", clips_per_video="3")
    return folder / "out"


def write_pair(prefix, documents, dtype="int32"):
    paths = [Path(f"{prefix}{extension}") for extension in (".bin", ".idx")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(*paths, dtype)
    for document in documents:
        writer.add(np.asarray(document))
    writer.finish()


def test_splits_share_no_source_and_miss_no_clip(prepared):
    parts = {
        name: TokenDataset(prepared, name, "4,1,1", seed=7)
        for name in ("train", "validation", "test")
    }
    sources = {name: {d.source(i) for i in range(len(d))} for name, d in parts.items()}
    assert [len(sources[name]) for name in parts] == [4, 1, 1]
    assert len(set().union(*sources.values())) == 6
    assert sorted(int(i) for d in parts.values() for i in d.indices) == list(range(18))
    assert parts["train"].latent_shape == (3, 2, 3) and parts["train"].vocab_size == 64
    item = parts["test"][0]
    assert item.shape == (18,) and item.dtype == torch.int64
    again = pickle.loads(pickle.dumps(parts["train"]))  # for DataLoader workers
    assert torch.equal(again[3], parts["train"][3])


def split_of(names, split_string="98,1,1", seed=1234):
    """The split of each name, as names of splits."""
    runs = SourceRuns.of((name, 1) for name in names)
    return [SPLITS[number] for number in split_digests(runs.digests(seed), split_string)]


def test_splits_hold_their_rules_for_many_sizes_shares_and_seeds():
    for seed in range(20):
        for number in (3, 4, 7, 50, 333):
            sources = [f"video-{i}" for i in range(number)]
            for text in ("98,1,1", "10,1,1", "1,1,1", "1,0,0", "5,0,1", "0.5,0.3,0.2"):
                shares = np.array([float(part) for part in text.split(",")])
                shares /= shares.sum()
                split = split_of(sources, text, seed)
                for name, share in zip(SPLITS, shares, strict=True):
                    assert (split.count(name) > 0) == (share > 0)
                    assert abs(split.count(name) - share * number) <= 2
                assert split_of(sources[::-1] * 2, text, seed) == split[::-1] * 2
    assert split_of(sources, seed=1) != split_of(sources, seed=2)


def test_splits_are_those_of_the_first_version():
    """Runs that were started with it go on: sources in the order of a seeded sha256."""
    names = [f"clip-{i} é.mp4" for i in range(97)]
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"7:{name}".encode()).digest())
    expected = {name: "train" for name in ordered[:81]}
    expected |= {name: "validation" for name in ordered[81:89]}
    expected |= {name: "test" for name in ordered[89:]}
    assert split_of(names, "10,1,1", 7) == [expected[name] for name in names]


def test_too_few_sources_switch_validation_off_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        assert split_of(["b", "a", "b"]) == ["train"] * 3
    assert "too few" in caplog.text


@pytest.mark.parametrize("text", ["1,1", "a,b,c", "0,1,1", "-1,1,1", "", "nan,1,1", "inf,1,1"])
def test_malformed_split_strings_are_refused(text):
    with pytest.raises(ConfigError, match="98,1,1"):
        split_of(["a"], text)


def test_the_original_recipes_layouts_are_read(tmp_path):
    generator = np.random.default_rng(0)
    documents = generator.integers(0, 64000, (5, 12))
    write_pair(f"{tmp_path}/direct/", documents)
    for number, part in ((0, documents[:2]), (2, documents[2:4]), (10, documents[4:])):
        write_pair(f"{tmp_path}/many/{number}/", part)
    write_pair(f"{tmp_path}/plain/tokens", documents, "uint16")
    for path in ("direct", "many", "plain/tokens", "plain"):
        data = TokenDataset(tmp_path / path, "all", latent_shape=(3, 2, 2))
        assert torch.equal(torch.stack(list(data)), torch.from_numpy(documents))
        assert data.manifest is None and data.latent_shape == (3, 2, 2)
        assert len({data.row(i).source for i in range(5)}) == 5
    assert len(TokenDataset(tmp_path / "many", "test", "3,1,1")) == 1
    data = TokenDataset([tmp_path / "direct", tmp_path / "plain"], "all")
    assert len(data) == 10 and data.seq_length == 12
    with pytest.raises(DatasetError, match="--latent_shape"):
        _ = data.latent_shape
    with pytest.raises(DatasetError, match="has 8 tokens"):
        TokenDataset(tmp_path / "direct", latent_shape=(2, 2, 2))
    with pytest.raises(DatasetError, match=r"vocabulary is \[0, 100\)"):
        TokenDataset(tmp_path / "direct", "all", vocab_size=100)[0]


def test_several_folders_must_have_one_contract(prepared, tmp_path):
    make_videos(tmp_path / "videos", 3)
    prepare_small(tmp_path / "videos", tmp_path / "same")
    prepare_small(tmp_path / "videos", tmp_path / "other", height=24)
    both = TokenDataset([prepared, tmp_path / "same"], "all")
    assert len(both) == 18 + 6
    assert both.fingerprint != TokenDataset(prepared).fingerprint
    assert TokenDataset(prepared).fingerprint == TokenDataset(prepared, "test").fingerprint
    with pytest.raises(DatasetError, match="clip height 16 here, 24 there"):
        TokenDataset([prepared, tmp_path / "other"])
    with pytest.raises(DatasetError, match="was asked for"):
        TokenDataset(prepared, latent_shape=(1, 1, 18))


def _edit(folder, **changes):
    value = json.loads((folder / "manifest.json").read_text())
    value["contract"].update(changes.pop("contract", {}))
    value.update(changes)
    (folder / "manifest.json").write_text(json.dumps(value))


DAMAGE = {
    "not JSON": lambda f: (f / "manifest.json").write_text("{"),
    "no contract": lambda f: (f / "manifest.json").write_text("{}"),
    "seq_length is '18'": lambda f: _edit(f, contract={"seq_length": "18"}),
    "is not 19 tokens": lambda f: _edit(f, contract={"seq_length": 19}),
    "format_version is 2": lambda f: _edit(f, contract={"format_version": 2}),
    "do not add up": lambda f: _edit(f, num_documents=17),
    "shard-00001.bin is missing": lambda f: (f / "shard-00001.bin").unlink(),
    "shard-00001.idx is damaged": lambda f: (f / "shard-00001.idx").write_bytes(b"x" * 9),
    "shard-00002.jsonl is damaged": lambda f: (f / "shard-00002.jsonl").write_text("x"),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_damage_is_named_in_one_sentence(prepared, tmp_path, words):
    folder = tmp_path / "copy"
    shutil.copytree(prepared, folder)
    DAMAGE[words](folder)
    with pytest.raises(DatasetError, match=words) as caught:
        TokenDataset(folder)
    assert "\n" not in str(caught.value)


def test_a_damaged_index_is_refused(tmp_path):
    write_pair(tmp_path / "a", [[1, 2, 3], [4, 5, 6]])
    assert ShardReader(tmp_path / "a")[1].tolist() == [4, 5, 6]
    good = (tmp_path / "a.idx").read_bytes()
    wrong_dtype = good[:17] + b"\x63" + good[18:]
    for bad in (b"", good[:20], good[:-9], wrong_dtype, good.replace(b"MM", b"XX")):
        (tmp_path / "a.idx").write_bytes(bad)
        with pytest.raises(DatasetError, match="is damaged"):
            ShardReader(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(good)
    (tmp_path / "a.bin").write_bytes(b"1234")
    with pytest.raises(DatasetError, match="has 4 bytes, its index says 24"):
        ShardReader(tmp_path / "a")


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_what_megatron_reads_is_read(tmp_path, dtype):
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 60000, length) for length in (7, 1, 300, 12)]
    write_pair(tmp_path / "a", documents, dtype)
    theirs = IndexedDataset(str(tmp_path / "a"))
    ours = ShardReader(tmp_path / "a")
    assert len(ours) == len(theirs) == 4
    np.testing.assert_array_equal(ours.lengths, theirs.sequence_lengths)
    for number, document in enumerate(documents):
        assert ours[number].dtype == theirs[number].dtype == dtype
        np.testing.assert_array_equal(ours[number], theirs[number])
        np.testing.assert_array_equal(ours[number], document)
    with pytest.raises(IndexError):
        ours[4]


def test_missing_and_empty_places_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        TokenDataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="holds no prepared data"):
        TokenDataset(tmp_path)
    with pytest.raises(DatasetError, match="no split"):
        TokenDataset(tmp_path, "val")


def test_the_dtype_fits_the_vocabulary():
    assert [token_dtype(size) for size in (1000, 64000, 65536)] == ["uint16", "uint16", "int32"]


def test_manifest_round_trip(prepared, tmp_path):
    manifest = Manifest.load(prepared)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert Manifest.load(tmp_path).fingerprint == manifest.fingerprint
