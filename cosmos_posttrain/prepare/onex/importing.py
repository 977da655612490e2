"""Import: a folder as 1X ships it becomes a prepared folder.

Flows in: 1X's files. Flows out: a folder as preparation writes it, one document a window, with two
more files for each of its shards:

    shard-00000.states     float32, (frames, state_width) of its windows
    shard-00000.segments   int32, (frames,)

Every window is stored, so that 1X's files can be written again. One whose frames come from two
segments, or that is not full, is marked ``unserved`` in its row. A shard is a fixed range of
windows, read, written and forgotten; a killed import is continued by the same command.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cosmos_posttrain import launch
from cosmos_posttrain.data.contract import Contract, TokenizerInfo, make_contract
from cosmos_posttrain.data.indexed import token_dtype
from cosmos_posttrain.data.layout import SEGMENTS_EXTENSION, STATES_EXTENSION, shard_name
from cosmos_posttrain.data.manifest import DocumentRow, Manifest
from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.files import sha256_of_json
from cosmos_posttrain.prepare.config import PrepareConfig
from cosmos_posttrain.prepare.folder import OutputFolder, ShardRecord, check_writable, write_shard
from cosmos_posttrain.prepare.onex.folder import OnexFolder, OnexShard
from cosmos_posttrain.prepare.onex.versions import OnexVersion
from cosmos_posttrain.prepare.runners import PreparationRanks
from cosmos_posttrain.runlog import ProgressDisplay

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOWS_PER_SHARD = 1024
CROSSES, NOT_FULL = "crosses a segment", "not full"


@dataclass(frozen=True)
class WindowRange:
    """The windows of one of our shards: a part of one of 1X's.

    Attributes:
        number: of our shard.
        shard: of 1X's.
        first: window in 1X's shard.
        num_windows: from there on.
    """

    number: int
    shard: OnexShard
    first: int
    num_windows: int


def window_ranges(shards: Sequence[OnexShard], version: OnexVersion) -> list[WindowRange]:
    """The windows of each of our shards, in order."""
    ranges: list[WindowRange] = []
    for shard in shards:
        total = version.num_windows(shard.num_frames)
        for first in range(0, total, WINDOWS_PER_SHARD):
            count = min(WINDOWS_PER_SHARD, total - first)
            ranges.append(WindowRange(len(ranges), shard, first, count))
    return ranges


def import_onex(config: PrepareConfig) -> Manifest:
    """Imports a folder, or continues, or finds it complete.

    Args:
        config: the settings, validated; ``input_tokens_dir`` is given.

    Returns:
        The manifest, on every rank.

    Raises:
        UserError: bad input; of a damaged token, what was read before it stays.
        SaveError: the disk is full; finished shards stay.
        CosmosPosttrainError: another rank ended; likewise.
    """
    assert config.input_tokens_dir is not None
    source, folder = config.input_tokens_dir, Path(config.output_prefix)
    check_writable(folder, config.overwrite)
    ranks = PreparationRanks()
    with ranks.locked(folder):
        onex = ranks.decide(lambda: OnexFolder(source))
        tokenizer = _tokenizer(config, onex.version)
        contract = make_contract(tokenizer, onex.version.clip, token_dtype(tokenizer.vocab_size))
        importing = _Import(onex, contract, folder, config.overwrite)
        jobs = ranks.deal(importing.start)
        if jobs is not None:
            progress = ProgressDisplay(len(jobs), "shards")
            for job in jobs:
                _write(onex, contract, job, folder)
                progress.advance("")
        return ranks.decide(importing.finish, gather_first=True)


class _Import:
    """What rank 0 decides for all: what there is to do, and the end."""

    def __init__(self, onex: OnexFolder, contract: Contract, folder: Path, overwrite: bool) -> None:
        self._onex, self._folder, self._overwrite = onex, folder, overwrite
        self._ranges = window_ranges(onex.shards, onex.version)
        self._output = OutputFolder(folder, contract, make_plan(onex), len(self._ranges))
        self._is_complete = False

    def start(self) -> list[WindowRange] | None:
        to_do = self._output.start(self._overwrite)
        self._is_complete = to_do is None
        if to_do is None:
            return None
        if len(to_do) < len(self._ranges):
            num_done = len(self._ranges) - len(to_do)
            launch.say(f"continuing {self._folder}: {num_done} shards are done.")
        return [self._ranges[number] for number in to_do]

    def finish(self) -> Manifest:
        if self._is_complete:
            manifest = Manifest.load(self._folder)
            launch.say(
                f"{self._folder} is complete already: {manifest.num_documents} windows; nothing to "
                "do."
            )
            return manifest
        manifest = self._output.finish()
        launch.say(
            f"imported {manifest.num_documents} windows of 1X v{self._onex.version.name} into "
            f"{self._folder}; {manifest.num_unserved} of them cross a segment or are not full: "
            "they are stored, but in no split."
        )
        return manifest


def make_plan(onex: OnexFolder) -> dict[str, Any]:
    """What was imported, and all that 1X's files need beside the shards to be written again."""
    return {
        "imported_from": f"1X v{onex.version.name}",
        "sources_sha256": sha256_of_json(onex.num_bytes()),
        "windows_per_shard": WINDOWS_PER_SHARD,
        "state_width": onex.state_width,
        "token_dtype": np.dtype(onex.dtype).name,
        "onex_shards": [
            {
                "num_frames": shard.num_frames,
                "video": shard.video,
                "segments": shard.segments,
                "states": [list(item) for item in shard.states],
            }
            for shard in onex.shards
        ],
        "onex_metadata": onex.metadata,
    }


def _tokenizer(config: PrepareConfig, version: OnexVersion) -> TokenizerInfo:
    """The version's, with the hash of its weights where they are named.

    Raises:
        TokenizerError: they are another tokenizer's.
    """
    known = version.tokenizer
    if config.encoder_path == PrepareConfig.encoder_path:
        return known
    from cosmos_posttrain.tokenizer import load_tokenizer_pair

    path = config.encoder_path
    given = load_tokenizer_pair(path, config.decoder_path or path, device=config.device)
    same = tuple(given.compression), tuple(given.levels)
    if same != (tuple(known.compression), tuple(known.levels)):
        raise TokenizerError(
            f"--encoder_path {path} compresses by {given.compression.name} with levels "
            f"{list(given.levels)}, but 1X v{version.name} was made by {known.id}; give that, or "
            "leave it out."
        )
    return dataclasses.replace(known, id=given.id, sha256=given.sha256)


def unserved_reasons(
    segments: NDArray[np.int32], num_windows: int, frames_per_window: int
) -> list[str | None]:
    """Why a window belongs to no split, for each; None where it does.

    Args:
        segments: (frames,) of these windows, in order.
        num_windows: the last may be not full.
        frames_per_window: of a full one.
    """
    reasons: list[str | None] = []
    for window in range(num_windows):
        part = segments[window * frames_per_window : (window + 1) * frames_per_window]
        crosses = bool((part != part[0]).any())
        is_short = len(part) < frames_per_window
        reasons.append(CROSSES if crosses else NOT_FULL if is_short else None)
    return reasons


def _write(onex: OnexFolder, contract: Contract, job: WindowRange, folder: Path) -> ShardRecord:
    """One of our shards."""
    shard, first, count = job.shard, job.first, job.num_windows
    num_frames = contract.clip.num_frames
    tokens = onex.tokens(shard, first, count).astype(contract.dtype)
    segments = onex.segments(shard, first, count)
    reasons = unserved_reasons(segments, count, num_frames)
    rows = []
    for window, reason in enumerate(reasons):
        start = (first + window) * num_frames
        rows.append(
            DocumentRow(
                window,
                f"shard {shard.number} segment {int(segments[window * num_frames])}",
                start,
                num_repeated=max(start + num_frames - shard.num_frames, 0),
                fps=onex.fps,
                unserved=reason,
            )
        )
    beside = {SEGMENTS_EXTENSION: segments.tobytes()}
    if onex.state_width:
        beside[STATES_EXTENSION] = onex.states(shard, first, count).tobytes()
    documents = list(zip(rows, tokens, strict=True))
    return write_shard(folder, shard_name(job.number), contract.dtype, documents, [], [], beside)
