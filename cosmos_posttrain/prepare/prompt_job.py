"""One shard of prompts: a pure function of its inputs, whoever runs it, wherever.

Flows in: distinct prompts and a text encoder. Flows out: the shard's files and a ``ShardRecord``.
Batches never reach over a shard's end, so its bytes depend on the prompts, the settings, and the
device and dtype of the text encoder alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cosmos_posttrain import launch
from cosmos_posttrain.data.contract import TextEncoderInfo
from cosmos_posttrain.data.layout import PROMPTS_PER_SHARD, prompt_shard_name
from cosmos_posttrain.data.prompts import PromptRow
from cosmos_posttrain.prepare.encoders import PreparationEncoders
from cosmos_posttrain.prepare.folder import ShardRecord, write_prompt_shard
from cosmos_posttrain.prepare.shard_job import pinned
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.text.rows import STORED_DTYPES, pack_rows

if TYPE_CHECKING:
    from cosmos_posttrain.text import TextEncoder


@dataclass(frozen=True)
class PromptJob:
    """All that decides a prompt shard's bytes, but the encoder.

    Attributes:
        number: of the shard.
        prompts: by number, from ``number * PROMPTS_PER_SHARD`` on.
        info: of the text encoder, and how rows are stored.
        batch_size: prompts in one call of the encoder.
        encoder_threads: CPU threads of the encoder.
        folder: where the shard is written.
    """

    number: int
    prompts: tuple[str, ...]
    info: TextEncoderInfo
    batch_size: int
    encoder_threads: int
    folder: Path

    def run(self, encoder: TextEncoder) -> ShardRecord:
        """Encodes and writes.

        Raises:
            TextError: an embedding is not finite.
            CosmosPosttrainError: the disk is full.
        """
        tokens = encoder.tokenize(self.prompts)
        with pinned(self.encoder_threads):
            embeddings = encoder.encode_tokens(tokens, self.batch_size)
        documents = [
            (PromptRow(item.prompt, item.num_tokens), pack_rows(rows, self.info.dtype))
            for item, rows in zip(tokens, embeddings, strict=True)
        ]
        cut = [warning for item in tokens if (warning := item.warning())]
        stored = STORED_DTYPES[self.info.dtype]
        return write_prompt_shard(
            self.folder, prompt_shard_name(self.number), stored, documents, cut
        )


def in_shards(prompts: Sequence[str]) -> list[tuple[str, ...]]:
    """The prompts of each shard."""
    step = PROMPTS_PER_SHARD
    return [tuple(prompts[i : i + step]) for i in range(0, len(prompts), step)]


def run_prompt_jobs(jobs: Sequence[PromptJob], encoders: PreparationEncoders) -> None:
    """Runs jobs one after the other in this process; loads the encoder only if there are any."""
    if not jobs:
        return
    encoder = encoders.text_encoder(jobs[0].info)
    num_prompts = sum(len(job.prompts) for job in jobs)
    num_ranks = launch.world_size()
    label = f"process 1 of {num_ranks}" if num_ranks > 1 else ""
    progress = ProgressDisplay(num_prompts, "prompts", label)
    done = 0
    for job in jobs:
        job.run(encoder)
        done += len(job.prompts)
        progress.show(done, "encoded")
