"""Quality, codebook use and speed of a video tokenizer on a folder of videos.

Flows in: a tokenizer and videos. Flows out, in the output folder: ``metrics.json`` and
``contact_sheet.png``.

    video --first frames--> clip (3, T, H, W) uint8 --encode--> tokens --decode--> reconstruction
          --> a row of PSNR, SSIM, codes and seconds --> means
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain import files, launch
from cosmos_posttrain.errors import PartialFailureError, UserError, VideoError
from cosmos_posttrain.evaluation import quality
from cosmos_posttrain.evaluation.config.tokenizer import TokenizerEvalConfig, validate
from cosmos_posttrain.evaluation.environment import environment
from cosmos_posttrain.evaluation.figures import contact_sheet
from cosmos_posttrain.evaluation.media import check_size, list_media, read_clip
from cosmos_posttrain.evaluation.result_folder import ResultFolder, check_foreign, result
from cosmos_posttrain.evaluation.timing import TimedCodec, speed
from cosmos_posttrain.geometry import ClipGeometry
from cosmos_posttrain.prepare.sources import VideoSource, sources_sha256
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.tokenizer import VideoTokenizer, load_tokenizer_pair
from cosmos_posttrain.video import decoder_label, decoder_name, to_float, to_uint8

_SHEET_FILE = "contact_sheet.png"
_SHEET_CLIPS = 4
_NAME_LENGTH = 28  # characters beside a row of the sheet
_MEANS = ("psnr", "ssim")


def run(config: TokenizerEvalConfig) -> dict[str, Any]:
    """Evaluates a tokenizer, or continues an evaluation, or finds it complete.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: bad settings or input; nothing was written.
        PartialFailureError: more than ``max_failures`` videos could not be read; the others are
            evaluated and written.
    """
    validate(config)
    sources = list_media(config.videos, leave_out=config.output)[: config.max_videos]
    files.check_writable(config.output)
    with files.locked(config.output):
        check_foreign(config.output, [_SHEET_FILE], config.overwrite)
        return _run_locked(config, sources)


def _run_locked(config: TokenizerEvalConfig, sources: Sequence[VideoSource]) -> dict[str, Any]:
    """The evaluation, by the one process that may write into the folder."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    tokenizer = load_tokenizer_pair(
        config.tokenizer,
        config.decoder or config.tokenizer,
        device=config.device,
        dtype=config.dtype,
    )
    check_size(config, tokenizer.compression)
    settings = _settings(config, tokenizer, sources)
    no_codes = quality.count_codes(torch.empty(0, dtype=torch.int64), tokenizer.vocab_size)
    folder = ResultFolder(config.output, settings, [_SHEET_FILE], {"code_counts": no_codes})
    metrics = folder.start(config.overwrite)
    if metrics is not None:
        print(f"{config.output} is complete already; nothing to do.", flush=True)
    else:
        try:
            _evaluate(config, tokenizer, sources, folder)
        except UserError:  # the tokenizer cannot take these clips
            folder.abandon()
            raise
        metrics = _summary(config, tokenizer, folder)
        if metrics["num_clips"]:
            _draw_sheet(config, tokenizer, sources, folder)
            folder.finish(metrics)
    _report(metrics, config)
    return metrics


def _settings(
    config: TokenizerEvalConfig, tokenizer: VideoTokenizer, sources: Sequence[VideoSource]
) -> dict[str, Any]:
    """All that decides the figures; a folder with others is another evaluation."""
    return {
        "command": "tokenizer",
        "tokenizer": {
            "id": tokenizer.id,
            "sha256": tokenizer.sha256,
            "compression": list(tokenizer.compression),
            "levels": list(tokenizer.levels),
            "vocab_size": tokenizer.vocab_size,
        },
        "decoder": config.decoder,
        "videos_read_by": decoder_name(),
        "num_videos": len(sources),
        "videos_sha256": sources_sha256(sources),
        "num_frames": config.num_frames,
        "height": config.height,
        "width": config.width,
        "device": tokenizer.device.type,
        "dtype": str(tokenizer.dtype).removeprefix("torch."),
        "num_threads": torch.get_num_threads(),
        "batch_size": config.batch_size,
    }


def _evaluate(
    config: TokenizerEvalConfig,
    tokenizer: VideoTokenizer,
    sources: Sequence[VideoSource],
    folder: ResultFolder,
) -> None:
    """Adds a row for every source that has none yet, in order."""
    num_done = len(folder.rows)
    if num_done:
        print(f"continuing {config.output}: {num_done} videos are done.", flush=True)
    codec = TimedCodec(tokenizer)
    progress, num_failed = ProgressDisplay(len(sources), "videos", done=num_done), 0
    for batch in _batches(sources[num_done:], config, tokenizer):
        if isinstance(batch[0][1], str):
            name, reason = batch[0][0].name, batch[0][1]
            launch.say(f"not read: {reason}", error=True)
            folder.append({"video": name, "error": reason})
            num_failed += 1
            progress.advance(f"{num_failed} failed")
            continue
        clips = torch.stack([clip for _, clip in batch if isinstance(clip, Tensor)])
        indices, decoded, *seconds = codec(clips)
        shares = [value / len(batch) for value in seconds]
        for (source, _), clip, tokens, rebuilt in zip(batch, clips, indices, decoded, strict=True):
            counts = quality.count_codes(tokens, tokenizer.vocab_size)
            row = {"video": source.name, **_size(clip), **_measure(clip, rebuilt)}
            row |= quality.codebook_use(counts) | speed(clip.shape[1], *shares)
            folder.append(row, {"code_counts": counts})
            progress.advance(f"{num_failed} failed")


def _batches(
    sources: Sequence[VideoSource], config: TokenizerEvalConfig, tokenizer: VideoTokenizer
) -> Iterator[list[tuple[VideoSource, Tensor | str]]]:
    """Neighbouring clips of equal size together; what cannot be read alone, with the reason."""
    pending: list[tuple[VideoSource, Tensor | str]] = []

    def shape(item: tuple[VideoSource, Tensor | str]) -> Sequence[int]:
        return item[1].shape if isinstance(item[1], Tensor) else ()

    for source in sources:
        try:
            item: tuple[VideoSource, Tensor | str] = (
                source,
                read_clip(source.path, config, tokenizer.compression),
            )
        except VideoError as error:
            item = (source, str(error))
        is_full = len(pending) == config.batch_size
        if pending and (is_full or shape(pending[0]) != shape(item) or not shape(item)):
            yield pending
            pending = []
        pending.append(item)
    if pending:
        yield pending


def _size(clip: Tensor) -> dict[str, int]:
    return dict(zip(("num_frames", "height", "width"), clip.shape[1:], strict=True))


def _measure(clip: Tensor, reconstruction: Tensor) -> dict[str, float]:
    num_threads = torch.get_num_threads()
    return {
        "psnr": quality.psnr(clip, reconstruction, num_threads),
        "ssim": quality.ssim(clip, reconstruction, num_threads),
    }


def _geometries(rows: Sequence[dict[str, Any]], tokenizer: VideoTokenizer) -> list[dict[str, Any]]:
    """The clip sizes that occurred, most frequent first."""
    sizes = Counter((row["num_frames"], row["height"], row["width"]) for row in rows)
    return [
        {
            "num_clips": count,
            "num_frames": size[0],
            "height": size[1],
            "width": size[2],
            "latent_shape": list(ClipGeometry(*size, tokenizer.compression).latent_shape),
        }
        for size, count in sizes.most_common()
    ]


def _summary(
    config: TokenizerEvalConfig, tokenizer: VideoTokenizer, folder: ResultFolder
) -> dict[str, Any]:
    """Means over the clips; codes and speed over all of them together."""
    rows = [row for row in folder.rows if "error" not in row]
    failures = [row for row in folder.rows if "error" in row]
    num_frames = sum(row["num_frames"] for row in rows)
    totals = [sum(row[f"{what}_seconds"] for row in rows) for what in ("encode", "decode")]
    figures: dict[str, Any] = {
        "num_clips": len(rows),
        "num_failures": len(failures),
        "geometries": _geometries(rows, tokenizer),
    }
    if rows:
        figures |= {name: sum(row[name] for row in rows) / len(rows) for name in _MEANS}
    figures |= quality.codebook_use(folder.sums["code_counts"])
    figures["max_entropy_bits"] = math.log2(tokenizer.vocab_size)
    figures |= speed(num_frames, totals[0], totals[1])
    used = environment(tokenizer.device, tokenizer.dtype) | {"batch_size": config.batch_size}
    used["videos_read_by"] = decoder_label()
    whole = result("tokenizer", folder.settings, figures, rows, failures, used, folder.seconds)
    # As they were before all commands had one shape.
    measured = ("device", "device_name", "dtype", "num_threads", "batch_size", "torch")
    older = {"videos_dir": config.videos, **figures}
    older |= {"measured_with": {key: used[key] for key in measured}, "videos": rows}
    return whole | older


def _draw_sheet(
    config: TokenizerEvalConfig,
    tokenizer: VideoTokenizer,
    sources: Sequence[VideoSource],
    folder: ResultFolder,
) -> None:
    """Draws the clips that came out best and worst, and some between."""
    ranked = [(row, s) for row, s in zip(folder.rows, sources, strict=True) if "error" not in row]
    ranked.sort(key=lambda pair: -pair[0]["psnr"])
    num_shown = min(_SHEET_CLIPS, len(ranked))
    places = [i * (len(ranked) - 1) // max(num_shown - 1, 1) for i in range(num_shown)]
    lines = []
    for row, source in (ranked[place] for place in places):
        clip = read_clip(source.path, config, tokenizer.compression)
        video = to_float(clip[None].to(tokenizer.device))
        rebuilt = to_uint8(tokenizer.decode(tokenizer.encode(video)))[0].cpu()
        lines.append((_caption(row), clip, rebuilt))
    title = f"{tokenizer.id}, {tokenizer.compression.name}"
    if len(ranked) > 1:
        title += f": {num_shown} of {len(ranked)} clips, best to worst PSNR"
    contact_sheet(lines, folder.folder / _SHEET_FILE, title)


def _caption(row: dict[str, Any]) -> str:
    name: str = row["video"]
    if len(name) > _NAME_LENGTH:
        name = "..." + name[3 - _NAME_LENGTH :]
    frames = "1 frame" if row["num_frames"] == 1 else f"{row['num_frames']} frames"
    size = f"{frames} of {row['width']}x{row['height']}"
    return f"{name}\n{row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}\n{size}"


def _report(metrics: dict[str, Any], config: TokenizerEvalConfig) -> None:
    """Says what came out, and raises if too many videos failed."""
    num_failures, num_clips = metrics["num_failures"], metrics["num_clips"]
    if num_clips == 0:
        reasons = itertools.islice((row["error"] for row in metrics["failures"]), 3)
        raise PartialFailureError(f"none of the videos could be read: {' '.join(reasons)}")
    used = metrics["measured_with"]
    print(
        f"{num_clips} clips: PSNR {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}; "
        f"{metrics['codes_used']} codes used ({metrics['vocabulary_share']:.1%}), "
        f"{metrics['entropy_bits']:.2f} of {metrics['max_entropy_bits']:.2f} bits; "
        f"{metrics['encode_frames_per_second']:.1f} frames/s encoded, "
        f"{metrics['decode_frames_per_second']:.1f} decoded "
        f"({used['device']}, {used['dtype']}, {used['num_threads']} threads): {config.output}",
        flush=True,
    )
    if num_failures > config.max_failures:
        raise PartialFailureError(
            f"{num_failures} of {num_clips + num_failures} videos could not be read, and "
            f"max_failures is {config.max_failures}; the others are evaluated in {config.output}, "
            "and metrics.json there names each with its reason."
        )
