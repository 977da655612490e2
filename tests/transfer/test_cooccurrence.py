"""What lies where: overlaps of two tokenizers' tokens in time and space, and their sums."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from helpers.full_disk import no_file_beyond
from helpers.two_tokenizers import Coarse, Shuffled, prepare_pair
from safetensors.numpy import save_file

from cosmos_posttrain.data.contract import Contract, TokenizerInfo, make_contract
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.data.manifest import DocumentRow, Manifest
from cosmos_posttrain.data.serial import to_plain
from cosmos_posttrain.data.shard_table import ShardTable
from cosmos_posttrain.errors import ConfigError, DatasetError, OutputFolderError
from cosmos_posttrain.files import sha256_of_file
from cosmos_posttrain.geometry import ClipGeometry, Compression
from cosmos_posttrain.transfer import counting
from cosmos_posttrain.transfer.align import align
from cosmos_posttrain.transfer.config import AlignConfig
from cosmos_posttrain.transfer.cooccurrence import Cooccurrence
from cosmos_posttrain.transfer.counting import PairSums
from cosmos_posttrain.transfer.overlap import PicturePairs, frame_intervals, time_overlaps


def contract(
    compression: tuple[int, int, int], frames: int, height: int, width: int, vocab_size: int = 12
) -> Contract:
    tokenizer = TokenizerInfo("t", "0" * 64, compression, (vocab_size,), vocab_size)
    geometry = ClipGeometry(frames, height, width, Compression(*tokenizer.compression))
    return make_contract(tokenizer, geometry, "uint16")


def test_latent_frames_lie_in_source_frames() -> None:
    clip = contract((4, 8, 8), 9, 16, 24)
    whole = frame_intervals(DocumentRow(0, "a", first_frame=10), clip)
    # Frame 10 alone, frames 11 to 14, frames 15 to 18.
    assert whole.tolist() == [[9.5, 10.5], [10.5, 14.5], [14.5, 18.5]]
    strided = frame_intervals(DocumentRow(0, "a", first_frame=10, stride=3), clip)
    assert strided.tolist() == [[8.5, 11.5], [11.5, 23.5], [23.5, 35.5]]
    # Only frames 0 to 2 are real: half of the second latent frame, none of the third.
    short = frame_intervals(DocumentRow(0, "a", num_repeated=6), clip)
    assert short[:2].tolist() == [[-0.5, 0.5], [0.5, 2.5]]
    assert time_overlaps(short, short).sum(axis=1).tolist() == [1.0, 2.0, 0.0]


def test_first_latent_frame_overlaps_as_one_frame() -> None:
    old, new = contract((8, 16, 16), 17, 64, 96), contract((4, 8, 8), 9, 32, 48)
    shared = time_overlaps(
        frame_intervals(DocumentRow(0, "a", first_frame=4), new),
        frame_intervals(DocumentRow(0, "a"), old),
    )
    # Source frames 4 | 5-8 | 9-12 against 0 | 1-8 | 9-16.
    assert shared.tolist() == [[0, 1, 0], [0, 4, 0], [0, 0, 4]]


def test_cells_share_the_picture() -> None:
    pairs = PicturePairs.of(contract((4, 8, 8), 9, 16, 24), contract((8, 16, 16), 9, 64, 96))
    assert pairs.areas.sum() == pytest.approx(1)
    # Each of 2x3 new cells holds 2x2 of the 4x6 old ones.
    assert np.bincount(pairs.new_cells).tolist() == [4] * 6
    assert sorted(pairs.old_cells) == list(range(24))
    assert pairs.old_cells[pairs.new_cells == 4].tolist() == [14, 15, 20, 21]


def test_another_aspect_ratio_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"96x64 and of 32x32 are cropped to different parts"):
        PicturePairs.of(contract((4, 8, 8), 9, 32, 32), contract((8, 16, 16), 17, 64, 96))


class StubClip:
    """A clip with tokens that are given."""

    def __init__(self, row: DocumentRow, grid: np.ndarray) -> None:
        self.row, self.grid = row, grid

    def tokens(self, _: Contract) -> np.ndarray:
        return self.grid.reshape(len(self.grid), -1)


def by_volume_elements(new: Contract, new_clip: StubClip, old: Contract, old_clip: StubClip):
    """C by looking at every element of half a frame by 1/48 of each side."""

    def spread(clip: StubClip, its: Contract) -> np.ndarray:
        volume = np.full((200, 48, 48), -1)
        rows, columns = clip.grid.shape[1:]
        for frame in range(its.clip.num_frames - clip.row.num_repeated):
            latent = -(-frame // its.tokenizer.compression[0])
            centre = 2 * (clip.row.first_frame + frame * clip.row.stride) + 20
            half = clip.row.stride
            picture = clip.grid[latent].repeat(48 // rows, 0).repeat(48 // columns, 1)
            volume[centre - half : centre + half] = picture
        return volume

    first, second = spread(new_clip, new), spread(old_clip, old)
    both = (first >= 0) & (second >= 0)
    counts = np.zeros((new.tokenizer.vocab_size, old.tokenizer.vocab_size))
    np.add.at(counts, (first[both], second[both]), 0.5 / 48**2)
    return counts


@pytest.mark.parametrize(
    ("new_row", "old_row"),
    [
        (DocumentRow(0, "a", 7), DocumentRow(0, "a", 3)),
        (DocumentRow(0, "a", 7, 2, 3), DocumentRow(0, "a", 0)),
        (DocumentRow(0, "a", 2, 1), DocumentRow(0, "a", 0, 3, 9)),
        (DocumentRow(0, "a", 30), DocumentRow(0, "a", 0)),
    ],
    ids=["shifted", "strided-and-short", "old-strided-and-short", "apart"],
)
def test_sums_equal_those_of_volume_elements(new_row: DocumentRow, old_row: DocumentRow) -> None:
    new, old = contract((4, 8, 8), 13, 24, 24, 9), contract((8, 16, 16), 17, 32, 32, 7)
    generator = np.random.default_rng(0)
    new_clip = StubClip(new_row, generator.integers(0, 9, new.latent_shape))
    old_clip = StubClip(old_row, generator.integers(0, 7, old.latent_shape))
    expected = by_volume_elements(new, new_clip, old, old_clip)
    counter = counting._Counter(old, new, PicturePairs.of(new, old), 1000)
    counter.add(new_clip, [old_clip])  # type: ignore[arg-type, list-item]
    counter.sums.finish()
    found = np.zeros(expected.size)
    found[counter.sums.keys] = counter.sums.volumes
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-9)
    assert counter.num_clip_pairs == bool(expected.any())
    # Sighted are the tokens of latent frames that some old clip shows too.
    shared = time_overlaps(frame_intervals(new_row, new), frame_intervals(old_row, old))
    sighted = np.bincount(new_clip.grid[shared.any(axis=1)].ravel(), minlength=9)
    assert counter.occurrences.tolist() == sighted.tolist()


def test_memory_is_bounded_and_heavy_pairs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "_BUFFERED_PAIRS", 500)
    generator = np.random.default_rng(0)
    sums, total = PairSums(max_pairs=100), 0.0
    for _ in range(40):
        light = generator.integers(1000, 100_000, 90)
        keys = np.concatenate([light, np.arange(10)])
        volumes = np.concatenate([np.full(90, 0.01), np.full(10, 1.0)])
        sums.add(keys, volumes)
        total += volumes.sum()
        assert len(sums.keys) <= 100 and sums._num_waiting < 500
    sums.finish()
    assert sums.volumes[:10] == pytest.approx(np.full(10, 40.0))
    assert sums.keys[:10].tolist() == list(range(10)) and (np.diff(sums.keys) > 0).all()
    assert sums.volumes.sum() + sums.dropped == pytest.approx(total)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One clip of each of five videos, by two tokenizers that differ in the names of codes."""
    return prepare_pair(tmp_path_factory.mktemp("pair"), Shuffled(), clips_per_video="1")


def config(pair: tuple[Path, Path], output: Path, **changes: object) -> AlignConfig:
    values = {"split_string": "1,0,0", **changes}
    return AlignConfig(str(pair[0]), str(pair[1]), str(output), **values)  # type: ignore[arg-type]


def test_renamed_codes_are_found_again(pair: tuple[Path, Path], tmp_path: Path) -> None:
    align(config(pair, tmp_path / "c.safetensors"))
    found = Cooccurrence.load(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(found.old_tokens, 63 - found.new_tokens)
    clips = TokenDataset(pair[1], "all")
    tokens = np.concatenate([clips[i].numpy() for i in range(len(clips))])
    np.testing.assert_array_equal(found.occurrences, np.bincount(tokens, minlength=64))
    assert (found.old.id, found.new.id) == ("block-mean", "shuffled")
    assert found.volumes.sum() == pytest.approx(5 * 9)  # frames times the whole picture
    assert found.record["num_clips"] == 5 and found.record["dropped_share"] == 0


def test_only_training_videos_count(pair: tuple[Path, Path], tmp_path: Path) -> None:
    align(config(pair, tmp_path / "c", split_string="3,1,1", seed=5))
    training = TokenDataset(pair[1], "train", "3,1,1", 5)
    tokens = np.concatenate([training[i].numpy() for i in range(len(training))])
    found = Cooccurrence.load(tmp_path / "c")
    np.testing.assert_array_equal(found.occurrences, np.bincount(tokens, minlength=64))
    align(config(pair, tmp_path / "two", max_clips=2))
    assert Cooccurrence.load(tmp_path / "two").record["num_clips"] == 2


def test_a_finished_file_is_left_alone(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "folder" / "c.safetensors"
    align(config(pair, output))
    before = output.read_bytes()
    align(config(pair, output))
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(OutputFolderError, match="give --overwrite"):
        align(config(pair, output, max_clips=2))
    assert output.read_bytes() == before
    align(config(pair, output, max_clips=2, overwrite=True))
    assert Cooccurrence.load(output).record["num_clips"] == 2
    assert [path.name for path in output.parent.iterdir()] == ["c.safetensors"]


def test_a_file_that_cannot_be_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    align(config(pair, tmp_path / "c"))
    before = (tmp_path / "c").read_bytes()
    with (
        pytest.raises(OutputFolderError, match=r"c cannot be written \(.*\); make room"),
        no_file_beyond(200),
    ):
        align(config(pair, tmp_path / "c", max_clips=2, overwrite=True))
    assert (tmp_path / "c").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    with pytest.raises(OutputFolderError, match=r"the folder of --output .* is a file"):
        align(config(pair, tmp_path / "c" / "d"))


def test_data_that_cannot_be_compared_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "c"
    with pytest.raises(ConfigError, match=r"--max_pairs 0 must be at least 1; --old_data_path is"):
        align(AlignConfig(max_pairs=0))
    (tmp_path / "other").mkdir()
    for path in pair[1].iterdir():
        text = path.read_bytes()
        if path.suffix == ".jsonl":
            text = text.replace(b'.mp4"', b'.mkv"')
        (tmp_path / "other" / path.name).write_bytes(text)
    record_anew(tmp_path / "other")
    with pytest.raises(DatasetError, match="shows the same frames of the same video"):
        align(config((pair[0], tmp_path / "other"), output))
    with pytest.raises(DatasetError, match="has no manifest"):
        align(config((pair[0] / "shard-00000", pair[1]), output))
    with pytest.raises(OutputFolderError, match="is a folder"):
        align(config(pair, tmp_path))
    assert not output.exists()


def record_anew(folder: Path) -> None:
    """Makes a copied manifest agree with its files."""
    manifest = Manifest.load(folder)
    shards = []
    for shard in manifest.shards:
        for extension, entry in shard.files.items():
            path = folder / f"{shard.name}.{extension}"
            entry.update(num_bytes=path.stat().st_size, sha256=sha256_of_file(path))
        shards.append(shard)
    dataclasses.replace(manifest, shards=ShardTable(shards)).save(folder)


def test_damaged_files_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="does not exist; write it"):
        Cooccurrence.load(tmp_path / "absent")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(DatasetError, match="is no co-occurrence file"):
        Cooccurrence.load(tmp_path / "text")
    save_file({"a": np.zeros(3)}, tmp_path / "weights")
    with pytest.raises(DatasetError, match="is no co-occurrence file"):
        Cooccurrence.load(tmp_path / "weights")
    align(config(pair, tmp_path / "c"))
    whole = Cooccurrence.load(tmp_path / "c")
    changes = (
        {"old_tokens": whole.old_tokens + 60},
        {"new_tokens": whole.new_tokens[::-1].copy()},
        {"occurrences": whole.occurrences[:-1]},
        {"volumes": -whole.volumes},
    )
    for change in changes:
        Cooccurrence(**(vars(whole) | change)).save(tmp_path / "wrong")
        with pytest.raises(DatasetError, match="its parts do not fit"):
            Cooccurrence.load(tmp_path / "wrong")


def test_vocabularies_may_differ(tmp_path: Path) -> None:
    align(config(prepare_pair(tmp_path, Coarse()), tmp_path / "c"))
    found = Cooccurrence.load(tmp_path / "c")
    assert to_plain(found.new)["vocab_size"] == 40 and found.occurrences.shape == (40,)
    heaviest = {}
    for new, old, volume in zip(found.new_tokens, found.old_tokens, found.volumes, strict=True):
        heaviest.setdefault(int(new), {})[int(old)] = float(volume)
    # Mostly at the same place and time a code is half of the old one.
    best = [max(olds, key=lambda old: olds[old]) // 2 == new for new, olds in heaviest.items()]
    assert np.mean(best) > 0.8
