"""Folders as 1X ships them, written from the documented layout, with made-up content."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_posttrain.data.contract import TokenizerInfo
from cosmos_posttrain.geometry import ClipGeometry, Compression
from cosmos_posttrain.prepare.onex import folder as onex_folder
from cosmos_posttrain.prepare.onex import versions

# Frames of each segment, shard by shard: borders within windows of 17, and tails.
SEGMENTS = ((51, 20, 34), (40,))
# The same layout with a small grid, so that a model is quick: (3, 4, 3) of 600 codes.
SMALL = versions.OnexVersion(
    "2.0",
    TokenizerInfo("small", "", (8, 8, 8), (10, 10, 6), 600),
    ClipGeometry(17, 32, 24, Compression(8, 8, 8)),
    17,
    25,
)
ACTIONS = {"driving_command": 2, "joint_pos": 21, "l_hand_closure": 1}


def write_v2(
    folder: Path,
    form: str = "train",
    segments: Sequence[Sequence[int]] = SEGMENTS,
    seed: int = 0,
    version: versions.OnexVersion = versions.V2_0,
) -> Path:
    """A v2.0 set; ``val`` has its files in one folder, ``train`` in one for each kind."""
    shape, vocab_size = version.clip.latent_shape, version.tokenizer.vocab_size
    generator = np.random.default_rng(seed)
    kinds = ("metadata", "videos", "segment_indices", "robot_states")
    places = [folder / kind if form == "train" else folder for kind in kinds]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    frames = [sum(part) for part in segments]
    head = {"num_shards": len(segments), "num_images": sum(frames), "hz": 30}
    (folder / "metadata.json").write_text(json.dumps(head))
    for number, (lengths, count) in enumerate(zip(segments, frames, strict=True)):
        text = json.dumps({"shard_ind": number, "shard_num_frames": count})
        (places[0] / f"metadata_{number}.json").write_text(text)
        tokens = generator.integers(0, vocab_size, (-(-count // 17), *shape), np.int32)
        tokens.tofile(places[1] / f"video_{number}.bin")
        ids = np.repeat(np.arange(len(lengths), dtype=np.int32) + 7, lengths)
        ids.tofile(places[2] / f"segment_idx_{number}.bin")
        states = generator.standard_normal((count, 25)).astype(np.float32)
        if count:
            states[0, 0] = np.nan
        states.tofile(places[3] / f"states_{number}.bin")
    return folder


def write_v1(folder: Path, segments: Sequence[int] = (40, 9), seed: int = 0) -> Path:
    """A v1.1 set."""
    generator = np.random.default_rng(seed)
    (folder / "actions").mkdir(parents=True)
    count = sum(segments)
    head = {"token_dtype": "uint32", "s": 16, "h": 16, "w": 16, "vocab_size": 2**18, "hz": 30}
    (folder / "metadata.json").write_text(json.dumps({**head, "num_images": count}, indent=4))
    generator.integers(0, 2**18, (count, 16, 16), np.uint32).tofile(folder / "video.bin")
    np.repeat(np.arange(len(segments), dtype=np.int32), segments).tofile(folder / "segment_ids.bin")
    for name, width in ACTIONS.items():
        values = generator.standard_normal((count, width)).astype(np.float32)
        values.tofile(folder / "actions" / f"{name}.bin")
    return folder


def use_small_version(monkeypatch: Any = None) -> None:
    """Reads v2.0 sets of the small grid from now on, until the test ends."""
    if monkeypatch is None:  # in a process of its own
        onex_folder.V2_0, versions.VERSIONS["2.0"] = SMALL, SMALL
    else:
        monkeypatch.setattr(onex_folder, "V2_0", SMALL)
        monkeypatch.setitem(versions.VERSIONS, "2.0", SMALL)
