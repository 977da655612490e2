"""Preparation: videos to clips to tokens to shards.

Flows in: a folder of videos (or a jsonl file) and a tokenizer. Flows out: a prepared folder.

    list the sources -> plan shards of them -> schedule those that are not done -> finish: manifest

A shard is a fixed list of videos, whatever the number of ranks and workers (``shard_job.py``);
ranks take shards in turn (``runners.py``). A killed run is continued by the same command
(``folder.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_posttrain import launch
from cosmos_posttrain.data.contract import (
    Contract,
    TextEncoderInfo,
    TokenizerInfo,
    make_contract,
)
from cosmos_posttrain.data.indexed import token_dtype
from cosmos_posttrain.data.manifest import Manifest
from cosmos_posttrain.errors import PartialFailureError, TokenizerError
from cosmos_posttrain.geometry import ClipGeometry, Compression
from cosmos_posttrain.prepare.config import PrepareConfig, geometry, validate
from cosmos_posttrain.prepare.decoding import ClipSpec
from cosmos_posttrain.prepare.folder import OutputFolder, check_writable
from cosmos_posttrain.prepare.prompt_job import PromptJob, in_shards, run_prompt_jobs
from cosmos_posttrain.prepare.runners import PreparationRanks, run_jobs
from cosmos_posttrain.prepare.shard_job import ClipEncoder, ShardJob
from cosmos_posttrain.prepare.sources import (
    VideoSource,
    arrange,
    from_folder,
    from_jsonl,
    number_prompts,
    parse_clips_per_video,
    sources_sha256,
)

if TYPE_CHECKING:
    from cosmos_posttrain.text import TextEncoder


def prepare(
    config: PrepareConfig,
    tokenizer: ClipEncoder | None = None,
    text_encoder: TextEncoder | None = None,
) -> Manifest:
    """Prepares a data set, or continues one, or finds it complete.

    Args:
        config: the settings.
        tokenizer: used instead of loading ``encoder_path``.
        text_encoder: used instead of loading ``text_encoder_path``, which must be given as well.

    Returns:
        The manifest, on every rank.

    Raises:
        UserError: bad settings or input, or another process is writing; nothing was written.
        PartialFailureError: more than ``max_failures`` videos could not be read; everything else
            is written and complete.
        SaveError: the disk is full; finished shards stay.
        CosmosPosttrainError: the machine cannot read now, or another rank ended; likewise.
    """
    validate(config)
    folder = Path(config.output_prefix)
    check_writable(folder, config.overwrite)
    ranks = PreparationRanks()
    with ranks.locked(folder):
        encoder = tokenizer or _load_encoder(config)
        if config.text_encoder_path is not None and text_encoder is None:
            text_encoder = _load_text_encoder(config)
        preparation = Preparation(config, encoder, text_encoder)
        jobs = ranks.deal(preparation.start)
        if text_encoder is not None:
            if jobs is not None:
                run_prompt_jobs(ranks.deal(preparation.prompt_jobs) or [], text_encoder)
            text_encoder.close()
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

    def __init__(
        self,
        config: PrepareConfig,
        encoder: ClipEncoder,
        text_encoder: TextEncoder | None = None,
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._text_encoder = text_encoder
        self._folder = Path(config.output_prefix)
        self._contract = _make_contract(
            encoder, geometry(config), text_encoder, config.embedding_dtype
        )
        self._prompts: list[tuple[str, ...]] = []  # of each shard
        self._output: OutputFolder | None = None  # once there is something to do

    def start(self) -> list[ShardJob] | None:
        """Lists the sources and says which shards are to do; None if the folder is complete.

        Raises:
            UserError: no sources, or the folder holds something else.
        """
        config = self._config
        sources = arrange(_list_sources(config), config.seed)
        if self._text_encoder is not None:
            sources, prompts = number_prompts(sources)
            self._prompts = in_shards(prompts)
        step = config.videos_per_shard
        shards = [sources[i : i + step] for i in range(0, len(sources), step)]
        plan = _make_plan(config, self._encoder, sources)
        if self._text_encoder is not None:
            plan |= _text_plan(config, self._text_encoder)
        output = OutputFolder(self._folder, self._contract, plan, len(shards), len(self._prompts))
        to_do = output.start(config.overwrite)
        if to_do is None:
            return None
        self._output = output
        if len(to_do) < len(shards):
            launch.say(f"continuing {self._folder}: {len(shards) - len(to_do)} shards are done.")
        return [self._job(number, shards[number]) for number in to_do]

    def prompt_jobs(self) -> list[PromptJob]:
        """Which prompt shards are to do, after ``start``."""
        assert self._output is not None and self._contract.text_encoder is not None
        config, info = self._config, self._contract.text_encoder
        batch_size, threads = config.text_encoder_batch_size, config.encoder_threads
        return [
            PromptJob(number, self._prompts[number], info, batch_size, threads, self._folder)
            for number in self._output.missing_prompts()
        ]

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


def _load_text_encoder(config: PrepareConfig) -> TextEncoder:
    from cosmos_posttrain.text import load_text_encoder

    assert config.text_encoder_path is not None
    return load_text_encoder(config.text_encoder_path, config.device, config.text_encoder_dtype)


def _make_contract(
    encoder: ClipEncoder, clip: ClipGeometry, text: TextEncoder | None, stored: str
) -> Contract:
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
    dtype = token_dtype(encoder.vocab_size)
    if text is None:
        return make_contract(info, clip, dtype)
    text_info = TextEncoderInfo(text.id, text.sha256, text.width, stored)
    return make_contract(info, clip, dtype, text_info, text.context_len)


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


def _text_plan(config: PrepareConfig, encoder: TextEncoder) -> dict[str, Any]:
    """Likewise, of the prompts."""
    return {
        "text_encoder_batch_size": config.text_encoder_batch_size,
        "text_encoder_device": encoder.device.type,
        "text_encoder_dtype": str(encoder.dtype).removeprefix("torch."),
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
