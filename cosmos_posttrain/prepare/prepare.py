"""Preparation: videos to clips to tokens to shards.

Flows in: a folder of videos (or a jsonl file) and a tokenizer, or tokens that others made
(``onex/``). Flows out: a prepared folder.

    list the sources -> plan shards of them -> schedule those that are not done: prompts, then clips
    -> finish: manifest

A shard is a fixed list of videos (``shard_job.py``) or prompts (``prompt_job.py``), whatever the
number of ranks and workers; ranks take shards in turn (``runners.py``), and load an encoder where
they have something to encode (``encoders.py``). A killed run is continued by the same command
(``folder.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_posttrain import launch
from cosmos_posttrain.data.contract import Contract, make_contract
from cosmos_posttrain.data.indexed import token_dtype
from cosmos_posttrain.data.manifest import Manifest
from cosmos_posttrain.errors import PartialFailureError
from cosmos_posttrain.prepare.config import PrepareConfig, geometry, validate
from cosmos_posttrain.prepare.decoding import ClipSpec
from cosmos_posttrain.prepare.encoders import PreparationEncoders
from cosmos_posttrain.prepare.folder import (
    DECODER,
    OutputFolder,
    check_writable,
    recorded_contract,
)
from cosmos_posttrain.prepare.onex.importing import import_onex
from cosmos_posttrain.prepare.prompt_job import PromptJob, in_shards, run_prompt_jobs
from cosmos_posttrain.prepare.pt_files import import_pt_files
from cosmos_posttrain.prepare.runners import PreparationRanks, check_decoder, run_jobs
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
from cosmos_posttrain.video import decoder_label, decoder_name

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
        UserError: bad settings or input, nothing here that decodes video, or another process is
            writing; nothing was written.
        PartialFailureError: more than ``max_failures`` videos could not be read; everything else
            is written and complete.
        SaveError: the disk is full; finished shards stay.
        CosmosPosttrainError: the machine cannot read now, or another rank ended; likewise.
    """
    validate(config)
    if config.input_tokens_dir is not None:
        return import_onex(config)
    folder = Path(config.output_prefix)
    check_writable(folder, config.overwrite)
    encoders = PreparationEncoders(config, tokenizer, text_encoder)
    ranks = PreparationRanks()
    with ranks.locked(folder):
        if config.input_pt_dir is not None:
            manifest = ranks.decide(lambda: import_pt_files(config, encoders))
        else:
            manifest = _prepare(config, encoders, ranks)
    _judge(manifest, config.max_failures, folder)
    return manifest


def _prepare(
    config: PrepareConfig, encoders: PreparationEncoders, ranks: PreparationRanks
) -> Manifest:
    """As ``prepare``, of videos."""
    preparation = Preparation(config, encoders)
    jobs = ranks.deal(preparation.start)
    check_decoder(jobs or [])
    if jobs is not None and encoders.has_text:
        run_prompt_jobs(ranks.deal(preparation.prompt_jobs) or [], encoders)
    encoders.close_text_encoder()
    if jobs:
        run_jobs(jobs, encoders.tokenizer(), config.num_workers)
    return ranks.decide(preparation.finish, gather_first=True)


class Preparation:
    """What rank 0 decides for all: what there is to do, and the end."""

    def __init__(self, config: PrepareConfig, encoders: PreparationEncoders) -> None:
        self._config = config
        self._encoders = encoders
        self._folder = Path(config.output_prefix)
        self._prompts: list[tuple[str, ...]] = []  # of each shard
        self._output: OutputFolder | None = None  # once there is something to do

    def start(self) -> list[ShardJob] | None:
        """Lists the sources and says which shards are to do; None if the folder is complete.

        Raises:
            UserError: no sources, an encoder that cannot be read or does not fit, or the folder
                holds something else.
        """
        config = self._config
        sources = arrange(_list_sources(config), config.seed)
        if self._encoders.has_text:
            sources, prompts = number_prompts(sources)
            self._prompts = in_shards(prompts)
        elif num_prompts := sum(source.prompt is not None for source in sources):
            launch.say(
                f"note: {num_prompts} of {len(sources)} videos have a prompt, which is not "
                "encoded: these are data for a base model. One with text needs --text_encoder_path."
            )
        step = config.videos_per_shard
        shards = [sources[i : i + step] for i in range(0, len(sources), step)]
        contract, plan = self._job_of(sources)
        output = OutputFolder(self._folder, contract, plan, len(shards), len(self._prompts))
        to_do = output.start(config.overwrite, decoder_label)
        if to_do is None:
            return None
        self._output = output
        if len(to_do) < len(shards):
            launch.say(f"continuing {self._folder}: {len(shards) - len(to_do)} shards are done.")
        return [self._job(contract, number, shards[number]) for number in to_do]

    def _job_of(self, sources: list[VideoSource]) -> tuple[Contract, dict[str, Any]]:
        """What a folder must be about so that this run may go on with it: contract and plan."""
        config, clip = self._config, geometry(self._config)
        tokenizer = self._encoders.tokenizer_facts()
        dtype = token_dtype(tokenizer.info.vocab_size)
        plan = _make_plan(config, sources) | tokenizer.plan
        if not self._encoders.has_text:
            return make_contract(tokenizer.info, clip, dtype), plan
        earlier = None if config.overwrite else recorded_contract(self._folder)
        is_needed = earlier is None and bool(self._prompts)
        text = self._encoders.text_facts(earlier, is_needed)
        contract = make_contract(tokenizer.info, clip, dtype, text.info, text.context_len)
        return contract, plan | text.plan

    def prompt_jobs(self) -> list[PromptJob]:
        """Which prompt shards are to do, after ``start``."""
        assert self._output is not None and self._output.contract.text_encoder is not None
        config, info = self._config, self._output.contract.text_encoder
        batch_size, threads = config.text_encoder_batch_size, config.encoder_threads
        return [
            PromptJob(number, self._prompts[number], info, batch_size, threads, self._folder)
            for number in self._output.missing_prompts()
        ]

    def _job(self, contract: Contract, number: int, sources: list[VideoSource]) -> ShardJob:
        config, clip = self._config, contract.clip
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
            contract,
            config.batch_size,
            config.encoder_threads,
            self._folder,
            decoder_name(),
        )

    def finish(self) -> Manifest:
        """Writes the manifest when all shards are done, or reads it where it was there before."""
        if self._output is None:
            manifest = Manifest.load(self._folder)
            decoder = manifest.plan.get(DECODER)
            launch.say(
                f"{self._folder} is complete already: {manifest.num_documents} clips"
                f"{f', decoded by {decoder}' if decoder else ''}; nothing to do."
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


def _make_plan(config: PrepareConfig, sources: list[VideoSource]) -> dict[str, Any]:
    """All that decides the bytes of the result, besides the contract and the encoders."""
    names = "clips_per_video frame_stride batch_size encoder_threads videos_per_shard seed".split()
    return {
        "num_sources": len(sources),
        "sources_sha256": sources_sha256(sources),
        **{name: getattr(config, name) for name in names},
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
