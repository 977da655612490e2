"""What a data set is: its contract and counts, in words. No torch.

Flows in: a prepared folder, or data of the original recipe. Flows out: lines of text.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cosmos_posttrain.data.config import InfoConfig, validate
from cosmos_posttrain.data.documents import open_shards
from cosmos_posttrain.data.manifest import Manifest


def info(config: InfoConfig) -> None:
    """Prints the contract and the counts.

    Raises:
        DatasetError: nothing is there, or it is damaged or incomplete.
    """
    validate(config)
    shards = open_shards(config.data_path)
    rows = [("data", config.data_path)]
    if shards.manifest is None:
        rows += [("manifest", "none: not prepared by this program")]
        rows += [("clips", f"{len(shards):,} of {shards.seq_length:,} tokens")]
    else:
        rows += _rows_of(shards.manifest)
    rows += [("fingerprint", shards.fingerprint)]
    for name, value in rows:
        print(f"{name:<13}{value}")


def _rows_of(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Name and value of each line."""
    contract = manifest.contract
    tokenizer, clip = contract.tokenizer, contract.clip
    yield "kind", contract.kind
    compression = "x".join(map(str, tokenizer.compression))
    levels = ",".join(map(str, tokenizer.levels))
    yield "tokenizer", f"{tokenizer.id} (sha256 {tokenizer.sha256})"
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
    num_listed = manifest.plan.get("num_sources")
    if isinstance(num_listed, int):
        num_rejected = sum(manifest.rejected.values())
        num_read = num_listed - manifest.num_failures - num_rejected
        yield "videos", f"{num_read:,} read, {manifest.num_failures:,} could not be read"
    for reason, count in manifest.rejected.items():
        yield "", f"{count:,} left out: {reason}"
