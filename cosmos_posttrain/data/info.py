"""What a data set is: its contract and counts, in words. No torch.

Flows in: a prepared folder, or data of the original recipe. Flows out: lines of text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cosmos_posttrain.data.config import InfoConfig, validate
from cosmos_posttrain.data.documents import open_shards
from cosmos_posttrain.data.layout import MANIFEST_FILE, PLAN_FILE
from cosmos_posttrain.data.manifest import Manifest
from cosmos_posttrain.data.shards import ShardSet


def info(config: InfoConfig) -> None:
    """Prints the contract and the counts; looks at no shard where there is a manifest.

    Raises:
        DatasetError: nothing is there, or it is damaged or incomplete.
    """
    validate(config)
    folder = Path(config.data_path)
    if any((folder / name).is_file() for name in (MANIFEST_FILE, PLAN_FILE)):
        rows = _rows_of(Manifest.load(folder))
    else:
        rows = _rows_without(open_shards(folder))
    for name, value in (("data", config.data_path), *rows):
        print(f"{name:<13}{value}")


def _rows_without(shards: ShardSet) -> Iterator[tuple[str, str]]:
    """Name and value of each line, for data without a manifest."""
    yield "manifest", "none: not prepared by this program"
    yield "clips", f"{len(shards):,} of {shards.seq_length:,} tokens"
    yield "fingerprint", shards.fingerprint


def _rows_of(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Name and value of each line."""
    contract = manifest.contract
    tokenizer, clip = contract.tokenizer, contract.clip
    yield "kind", contract.kind
    compression = "x".join(map(str, tokenizer.compression))
    levels = ",".join(map(str, tokenizer.levels))
    yield "tokenizer", f"{tokenizer.id} (sha256 {tokenizer.sha256 or 'not known'})"
    yield "", f"compression {compression}, levels {levels}, {tokenizer.vocab_size:,} codes"
    yield "clip", f"{clip.num_frames} frames of {clip.width} x {clip.height} pixels"
    shape = ",".join(map(str, contract.latent_shape))
    yield "tokens", f"{contract.seq_length:,} a clip, latent shape {shape}, {contract.dtype}"
    if (text := contract.text_encoder) is not None:
        yield "text encoder", f"{text.id} (sha256 {text.sha256})"
        num_prompts = int(manifest.prompts.num_documents.sum())
        rows = f"{contract.context_len} rows of {text.width} numbers, {text.dtype}"
        yield "prompts", f"{num_prompts:,} distinct, {rows}"
    shards = manifest.shards
    num_bytes = sum(int(np.maximum(c.num_bytes, 0).sum()) for c in shards.files.values())
    yield (
        "clips",
        f"{manifest.num_documents:,} in {len(shards):,} shards, {num_bytes / 1e9:,.3f} GB",
    )
    if manifest.num_unserved:
        what = "of them in no split: their frames do not belong together"
        yield "", f"{manifest.num_unserved:,} {what}"
    num_listed = manifest.plan.get("num_sources")
    if isinstance(num_listed, int):
        num_rejected = sum(manifest.rejected.values())
        num_read = num_listed - manifest.num_failures - num_rejected
        yield "videos", f"{num_read:,} read, {manifest.num_failures:,} could not be read"
    if decoder := manifest.plan.get("decoder"):
        yield "", f"decoded by {decoder}"
    for reason, count in manifest.rejected.items():
        yield "", f"{count:,} left out: {reason}"
    yield "fingerprint", manifest.fingerprint
