"""A folder of the 1X World Model Challenge as 1X ships it. No torch.

Flows in: a folder. Flows out: its shards, every file's size compared with what the metadata says,
and parts of them as arrays. Nothing is read but the metadata until a part is asked for.

    v2.0 train   metadata.json  metadata/metadata_R.json  videos/video_R.bin
                 segment_indices/segment_idx_R.bin  robot_states/states_R.bin
    v2.0 val     metadata.json  metadata_R.json  video_R.bin  segment_idx_R.bin  states_R.bin
    v2.0 test    as val, but without segments: every window is a sample by itself, so the size of
                 video_R.bin says how many there are; states and metadata_R.json are not read
    v1.1         metadata.json  video.bin  segment_ids.bin  actions/NAME.bin
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain import files
from cosmos_posttrain.data.limits import naming_limits
from cosmos_posttrain.errors import DatasetError
from cosmos_posttrain.prepare.onex.versions import V1_1, V2_0, OnexVersion

if TYPE_CHECKING:
    from numpy.typing import NDArray

METADATA_FILE = "metadata.json"
_FIX = "download it again, or name a folder with 1X's own files"
_FORMS = {  # where the files of a v2.0 shard are
    "train": ("metadata/", "videos/", "segment_indices/", "robot_states/"),
    "val": ("", "", "", ""),
}
_TOKEN_DTYPES = {"uint16": "<u2", "int32": "<i4", "uint32": "<u4"}


@dataclass(frozen=True)
class OnexShard:
    """One shard's files, by their paths in the folder.

    Attributes:
        number: of the shard.
        num_frames: of it.
        video: tokens.
        segments: int32, the segment of every frame; "" where there are none.
        states: float32 numbers of every frame: paths and widths.
    """

    number: int
    num_frames: int
    video: str
    segments: str
    states: tuple[tuple[str, int], ...]


class OnexFolder:
    """A folder of one version, complete and of the right sizes.

    Args:
        path: the folder.
        is_test: it is a v2.0 test set.

    Attributes:
        path: the folder.
        version: of its files.
        fps: frames a second.
        dtype: of the tokens in their files.
        metadata: text of each metadata file, by its path in the folder.
        shards: in order.

    Raises:
        DatasetError: a file is missing, damaged, or of another size than its metadata say.
    """

    def __init__(self, path: str | Path, is_test: bool = False) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise DatasetError(f"the folder {path} does not exist; name a folder with 1X's data.")
        self.metadata: dict[str, str] = {}
        head = self._read_metadata(METADATA_FILE)
        self.fps = float(_number(head, "hz", self.path / METADATA_FILE, (int, float)))
        self.dtype = "<i4"
        if "num_shards" not in head and "vocab_size" not in head:
            raise DatasetError(
                f"{self.path / METADATA_FILE} has neither v2.0's num_shards nor v1.1's vocab_size; "
                f"{_FIX}."
            )
        is_v2 = "num_shards" in head
        self.version: OnexVersion = V2_0 if is_v2 else V1_1
        if not is_v2:
            self.shards = self._shards_v1(head)
        else:
            self.shards = self._shards_test(head) if is_test else self._shards_v2(head)
        for shard in self.shards:
            self._check_sizes(shard)

    @property
    def state_width(self) -> int:
        """Numbers of each frame's state."""
        return sum(width for _, width in self.shards[0].states)

    @property
    def num_windows(self) -> int:
        """Of all shards, those that are not full counted in."""
        return sum(self.version.num_windows(shard.num_frames) for shard in self.shards)

    def num_bytes(self) -> list[tuple[str, int]]:
        """Name and size of every file that belongs to the set."""
        names = list(self.metadata)
        for shard in self.shards:
            names += [shard.video, shard.segments, *(name for name, _ in shard.states)]
        return [(name, (self.path / name).stat().st_size) for name in names if name]

    # What the metadata say.

    def _read_metadata(self, name: str) -> dict[str, Any]:
        path = self.path / name
        with naming_limits(str(path)):
            value = files.read_json(path, DatasetError, _FIX)
            text = path.read_bytes().decode()  # as it is, for the way back
        self.metadata[name] = text
        return value

    def _shards_v2(self, head: dict[str, Any]) -> list[OnexShard]:
        num_shards = _number(head, "num_shards", self.path / METADATA_FILE, at_least=1)
        is_val = (self.path / "metadata_0.json").is_file()
        metadata, videos, segments, states = _FORMS["val" if is_val else "train"]
        shards = []
        for number in range(num_shards):
            name = f"{metadata}metadata_{number}.json"
            num_frames = _number(self._read_metadata(name), "shard_num_frames", self.path / name)
            shards.append(
                OnexShard(
                    number,
                    num_frames,
                    f"{videos}video_{number}.bin",
                    f"{segments}segment_idx_{number}.bin",
                    ((f"{states}states_{number}.bin", V2_0.state_width or 0),),
                )
            )
        return shards

    def _shards_test(self, head: dict[str, Any]) -> list[OnexShard]:
        window = 4 * V2_0.clip.seq_length
        shards = []
        for number in range(_number(head, "num_shards", self.path / METADATA_FILE, at_least=1)):
            name = f"video_{number}.bin"
            found = _size_of(self.path / name)
            if found % window:
                raise DatasetError(
                    f"{self.path / name} has {found} bytes, expected a multiple of {window}: "
                    f"windows of {tuple(V2_0.clip.latent_shape)} of int32; {_FIX}."
                )
            shards.append(OnexShard(number, found // window * V2_0.clip.num_frames, name, "", ()))
        return shards

    def _shards_v1(self, head: dict[str, Any]) -> list[OnexShard]:
        path = self.path / METADATA_FILE
        num_frames = _number(head, "num_images", path, at_least=1)
        wanted = {"s": V1_1.clip.latent_shape.height, "vocab_size": V1_1.tokenizer.vocab_size}
        for key, value in wanted.items():
            if _number(head, key, path) != value:
                raise DatasetError(
                    f"{path} says {key} {head[key]}, but v1.1 has {value}; only 1X's v1.1 and v2.0 "
                    "are read."
                )
        if head.get("token_dtype") not in _TOKEN_DTYPES:
            raise DatasetError(
                f"{path} says token_dtype {head.get('token_dtype')!r}, which is none of "
                f"{', '.join(_TOKEN_DTYPES)}; {_FIX}."
            )
        self.dtype = _TOKEN_DTYPES[head["token_dtype"]]
        states = []
        for file in sorted((self.path / "actions").glob("*.bin")):
            width, rest = divmod(_size_of(file), 4 * max(num_frames, 1))
            if rest or not width:
                raise DatasetError(
                    f"{file} has {_size_of(file)} bytes, expected a multiple of {4 * num_frames}: "
                    f"float32 numbers of {num_frames} frames; {_FIX}."
                )
            states.append((f"actions/{file.name}", width))
        return [OnexShard(0, num_frames, "video.bin", "segment_ids.bin", tuple(states))]

    def _check_sizes(self, shard: OnexShard) -> None:
        frames, version = shard.num_frames, self.version
        record = version.clip.latent_shape[0 if version.frames_per_record > 1 else 1 :]
        expected: list[tuple[str, str, tuple[int, ...]]] = [
            (shard.video, self.dtype, (version.num_records(frames), *record)),
            (shard.segments, "<i4", (frames,)),
            *((name, "<f4", (frames, width)) for name, width in shard.states),
        ]
        for name, dtype, shape in (item for item in expected if item[0]):
            num_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
            found = _size_of(self.path / name)
            if found != num_bytes:
                raise DatasetError(
                    f"{self.path / name} has {found} bytes, expected {num_bytes}: {shape} of "
                    f"{np.dtype(dtype).name}, as its metadata says {frames} frames; {_FIX}."
                )

    # What the files hold.

    def frames(self, shard: OnexShard, first: int, num_windows: int) -> slice:
        """The frames of some windows of a shard, as far as there are any."""
        step = self.version.clip.num_frames
        return slice(first * step, min((first + num_windows) * step, shard.num_frames))

    def tokens(self, shard: OnexShard, first: int, num_windows: int) -> NDArray[Any]:
        """Tokens of some windows, (n, seq_length) in the file's dtype.

        Where a last window of v1.1 is not full, its last frame is repeated.

        Raises:
            DatasetError: the file became shorter, or a token lies outside the vocabulary.
        """
        version, clip = self.version, self.version.clip
        frames = self.frames(shard, first, num_windows)
        width = version.tokens_per_record
        start = frames.start // version.frames_per_record
        count = version.num_records(frames.stop - frames.start)
        values = self._part(shard.video, self.dtype, start * width, count * width)
        size = version.tokenizer.vocab_size
        outside = np.flatnonzero((values < 0) | (values >= size))
        if outside.size:
            wrong = int(outside[0])
            raise DatasetError(
                f"{self.path / shard.video} holds token {int(values[wrong])} at number "
                f"{start * width + wrong}, outside the vocabulary of {size}: {_FIX}."
            )
        records = values.reshape(count, width)
        total = version.num_windows(frames.stop - frames.start) * clip.seq_length // width
        if total > count:
            records = np.concatenate([records, np.repeat(records[-1:], total - count, axis=0)])
        return records.reshape(-1, clip.seq_length)

    def segments(self, shard: OnexShard, first: int, num_windows: int) -> NDArray[np.int32]:
        """The segment of every frame of some windows, (frames,); of a test set, its window."""
        frames = self.frames(shard, first, num_windows)
        if not shard.segments:
            numbers = np.arange(frames.start, frames.stop) // self.version.clip.num_frames
            return numbers.astype(np.int32)
        return self._part(shard.segments, "<i4", frames.start, frames.stop - frames.start)

    def states(self, shard: OnexShard, first: int, num_windows: int) -> NDArray[np.uint32]:
        """The states of every frame of some windows, (frames, state_width), the floats' bits."""
        frames = self.frames(shard, first, num_windows)
        count = frames.stop - frames.start
        parts = [
            self._part(name, "<u4", frames.start * width, count * width).reshape(count, width)
            for name, width in shard.states
        ]
        return np.concatenate(parts, axis=1) if parts else np.empty((count, 0), np.uint32)

    def _part(self, name: str, dtype: str, first: int, count: int) -> NDArray[Any]:
        path = self.path / name
        size = np.dtype(dtype).itemsize
        with naming_limits(str(path)):
            values = np.fromfile(path, dtype, count, offset=first * size)
        if values.size != count:
            raise DatasetError(
                f"{path} ends at byte {(first + values.size) * size}; expected "
                f"{(first + count) * size} bytes or more: {_FIX}."
            )
        return values


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise DatasetError(f"{path} is missing; {_FIX}.") from error
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}.") from error


def _number(
    values: dict[str, Any], key: str, path: Path, kinds: Sequence[type] = (int,), at_least: int = 0
) -> Any:
    value: Any = values.get(key)
    if type(value) not in kinds or value < at_least:
        raise DatasetError(f"{path} is damaged: its {key} is {value!r}; {_FIX}.")
    return value
