"""Preparation: videos to clips to tokens to shards.

Flows in: a folder of videos (or a jsonl file) and a tokenizer. Flows out: a prepared folder.

    list the sources -> plan shards of them -> schedule those that are not done -> finish: manifest

A shard is a fixed list of videos, whatever the number of ranks and workers (``shard_job.py``);
ranks take shards in turn (``runners.py``). A killed run is continued by the same command
(``folder.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos_posttrain import launch
from cosmos_posttrain.data.contract import Contract, TokenizerInfo, make_contract
from cosmos_posttrain.data.indexed import token_dtype
from cosmos_posttrain.data.manifest import Manifest
from cosmos_posttrain.errors import PartialFailureError, TokenizerError
from cosmos_posttrain.geometry import ClipGeometry, Compression
from cosmos_posttrain.prepare.config import PrepareConfig, geometry, validate
from cosmos_posttrain.prepare.decoding import ClipSpec
from cosmos_posttrain.prepare.folder import OutputFolder, check_writable
from cosmos_posttrain.prepare.runners import PreparationRanks, run_jobs
from cosmos_posttrain.prepare.shard_job import ClipEncoder, ShardJob
from cosmos_posttrain.prepare.sources import (
    VideoSource,
    arrange,
    from_folder,
    from_jsonl,
    parse_clips_per_video,
    sources_sha256,
)


def prepare(config: PrepareConfig, tokenizer: ClipEncoder | None = None) -> Manifest:
    """Prepares a data set, or continues one, or finds it complete.

    Args:
        config: the settings.
        tokenizer: used instead of loading ``encoder_path``.

    Returns:
        The manifest, on every rank.

    Raises:
        UserError: bad settings or input, or another process is writing; nothing was written.
        PartialFailureError: more than ``max_failures`` videos could not be read; everything else
            is written and complete.
        CosmosPosttrainError: the disk is full, or another rank ended; finished shards stay.
    """
    validate(config)
    folder = Path(config.output_prefix)
    check_writable(folder, config.overwrite)
    with PreparationRanks() as ranks, ranks.locked(folder):
        encoder = tokenizer or _load_encoder(config)
        preparation = Preparation(config, encoder)
        jobs = ranks.deal(preparation.start)
        if jobs is not None:
            run_jobs(jobs, encoder, config.num_workers)
        manifest = ranks.decide(preparation.finish, gather_first=True)
    _judge(manifest, config.max_failures, folder)
    return manifest


class Preparation:
    """What rank 0 decides for all: what there is to do, and the end.

    Raises:
        TokenizerError: the tokenizer has another compression than the settings say.
    """

    def __init__(self, config: PrepareConfig, encoder: ClipEncoder) -> None:
        self._config = config
        self._encoder = encoder
        self._folder = Path(config.output_prefix)
        self._contract = _make_contract(encoder, geometry(config))
        self._output: OutputFolder | None = None  # once there is something to do

    def start(self) -> list[ShardJob] | None:
        """Lists the sources and says which shards are to do; None if the folder is complete.

        Raises:
            UserError: no sources, or the folder holds something else.
        """
        config = self._config
        sources = arrange(_list_sources(config), config.seed)
        step = config.videos_per_shard
        shards = [sources[i : i + step] for i in range(0, len(sources), step)]
        plan = _make_plan(config, self._encoder, sources)
        output = OutputFolder(self._folder, self._contract, plan, len(shards))
        to_do = output.start(config.overwrite)
        if to_do is None:
            return None
        self._output = output
        if len(to_do) < len(shards):
            launch.say(f"continuing {self._folder}: {len(shards) - len(to_do)} shards are done.")
        return [self._job(number, shards[number]) for number in to_do]

    def _job(self, number: int, sources: list[VideoSource]) -> ShardJob:
        config, clip = self._config, self._contract.clip
        spec = ClipSpec(
            clip.num_frames,
            clip.height,
            clip.width,
            config.frame_stride,
            parse_clips_per_video(config.clips_per_video),
        )
        return ShardJob(
            number,
            tuple(sources),
            spec,
            self._contract,
            config.batch_size,
            config.encoder_threads,
            self._folder,
        )

    def finish(self) -> Manifest:
        """Writes the manifest when all shards are done, or reads it where it was there before."""
        if self._output is None:
            manifest = Manifest.load(self._folder)
            launch.say(
                f"{self._folder} is complete already: {manifest.num_documents} clips; nothing to "
                "do."
            )
            return manifest
        manifest = self._output.finish()
        num_rejected = sum(manifest.rejected.values())
        num_read = manifest.plan["num_sources"] - manifest.num_failures - num_rejected
        launch.say(
            f"prepared {manifest.num_documents} clips from {num_read} videos in {self._folder}."
        )
        return manifest


def _list_sources(config: PrepareConfig) -> list[VideoSource]:
    if config.input_videos_dir is not None:
        return from_folder(config.input_videos_dir)
    assert config.input_jsonl is not None
    return from_jsonl(config.input_jsonl)


def _load_encoder(config: PrepareConfig) -> ClipEncoder:
    from cosmos_posttrain.tokenizer import load_tokenizer_pair

    encoder: ClipEncoder = load_tokenizer_pair(
        config.encoder_path,
        config.decoder_path or config.encoder_path,
        config.tokenizer_compression_factor,
        config.device,
        config.dtype,
    )
    return encoder


def _make_contract(encoder: ClipEncoder, clip: ClipGeometry) -> Contract:
    if tuple(encoder.compression) != tuple(clip.compression):
        raise TokenizerError(
            f"the tokenizer {encoder.id} compresses by {Compression(*encoder.compression).name}, "
            f"but tokenizer_compression_factor is {clip.compression}; make them agree."
        )
    info = TokenizerInfo(
        encoder.id,
        encoder.sha256,
        tuple(encoder.compression),
        tuple(encoder.levels),
        encoder.vocab_size,
    )
    return make_contract(info, clip, token_dtype(encoder.vocab_size))


def _make_plan(
    config: PrepareConfig, encoder: ClipEncoder, sources: list[VideoSource]
) -> dict[str, Any]:
    """All that decides the bytes of the result, besides the contract."""
    names = "clips_per_video frame_stride batch_size encoder_threads videos_per_shard seed".split()
    return {
        "num_sources": len(sources),
        "sources_sha256": sources_sha256(sources),
        **{name: getattr(config, name) for name in names},
        "encoder_device": encoder.device.type,
        "encoder_dtype": str(encoder.dtype).removeprefix("torch."),
    }


def _judge(manifest: Manifest, max_failures: int, folder: Path) -> None:
    """Says which videos failed, and raises if they are too many."""
    for failure in manifest.failures[:10]:
        launch.say(f"not read: {failure.source}: {failure.reason}", error=True)
    if manifest.num_failures > max_failures:
        raise PartialFailureError(
            f"{manifest.num_failures} of {manifest.plan['num_sources']} videos could not be read, "
            f"and max_failures is {max_failures}; the others are complete in {folder}, and "
            "failures.jsonl there names each with its reason."
        )
    if manifest.num_documents == 0:
        raise PartialFailureError(f"no clip could be read, so {folder} is of no use.")
