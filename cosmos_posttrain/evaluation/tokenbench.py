"""PSNR, SSIM, and with the user's weights LPIPS and rFVD, of videos against references by name.

Flows in: a folder of reference videos and one of videos to score. Flows out, in the latter:
``psnr.json`` and ``ssim.json`` (lists of [file name, value]), ``metrics.json``, ``metrics.csv``.

    pair --frames, two at a time--> errors and similarities --> a row --> means
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cosmos_posttrain import files, launch
from cosmos_posttrain.data.threads import mapped
from cosmos_posttrain.errors import ConfigError, OutputFolderError, PartialFailureError, VideoError
from cosmos_posttrain.evaluation import fvd, quality
from cosmos_posttrain.evaluation.config.tokenbench import TokenBenchConfig, validate
from cosmos_posttrain.evaluation.environment import environment
from cosmos_posttrain.evaluation.lpips import LPIPS, MIN_SIZE, load_lpips
from cosmos_posttrain.evaluation.pairs import Pair, Pairs, Window, find_pairs, iter_pair, window_of
from cosmos_posttrain.evaluation.result_folder import METRICS_FILE, ResultFolder, result
from cosmos_posttrain.prepare.sources import VideoSource, sources_sha256
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.video import decoder_label, decoder_name, to_float

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TABLE_FILE = "metrics.csv"
_BY_CLIP = ("psnr", "ssim", "lpips")
_PRODUCTS = (*(f"{name}.json" for name in _BY_CLIP), _TABLE_FILE)
_MAX_NAMED = 10


@dataclass(frozen=True)
class Networks:
    """The user's networks; None where there are no weights.

    Attributes:
        lpips: of pictures.
        i3d: of clips.
        device: of both.
        lock: they run one clip at a time.
    """

    lpips: LPIPS | None
    i3d: fvd.I3D | None
    device: torch.device
    lock: threading.Lock


@dataclass(frozen=True)
class _Scored:
    """A row, and what it adds to the moments of rFVD."""

    row: dict[str, Any]
    addends: dict[str, NDArray[np.float64]] | None = None


def run(config: TokenBenchConfig) -> dict[str, Any]:
    """Compares two folders, or continues a comparison, or finds it complete.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        UserError: bad settings or input; nothing was written.
        PartialFailureError: more than ``max_failures`` videos could not be read; the others are
            scored and written.
    """
    validate(config)
    found = find_pairs(Path(config.gtpath), Path(config.targetpath), config.recursive)
    windows = _windows(config, found.pairs)
    networks = _load_networks(config, windows)
    files.check_writable(config.output)
    with files.locked(config.output):
        sums = {} if networks.i3d is None else fvd.no_moments(networks.i3d.width)
        settings = _settings(config, found)
        _check_results(config)
        folder = ResultFolder(config.output, settings, _PRODUCTS, sums)
        metrics = folder.start(config.overwrite)
        if metrics is not None:
            launch.say(f"{config.output} is complete already; nothing to do.")
        else:
            _score_all(config, found.pairs, windows, networks, folder)
            metrics = _summary(config, found, folder, networks)
            if metrics["rows"]:
                _write_tables(config.output, metrics["rows"])
                folder.finish(metrics)
    _report(metrics, config)
    return metrics


def _windows(config: TokenBenchConfig, pairs: Sequence[Pair]) -> list[Window | VideoError]:
    """What to compare of each pair; all pairs are looked at before anything is scored.

    Raises:
        UserError: the first pair that does not go together, and how many there are.
    """

    def look(pair: Pair) -> Any:
        return window_of(pair, config.width, config.num_frames, config.skip_frames)

    looked = list(mapped(look, pairs, config.num_workers, chunk_size=1))
    wrong = [item for item in looked if not isinstance(item, (Window, VideoError))]
    if wrong:
        more = f" (so have {len(wrong) - 1} more pairs)" if len(wrong) > 1 else ""
        raise ConfigError(str(wrong[0]).removesuffix(".") + more + ".")
    return looked


def _load_networks(config: TokenBenchConfig, windows: Sequence[Window | VideoError]) -> Networks:
    device = launch.device(config.device)
    lpips, i3d = None, None
    known = [window for window in windows if isinstance(window, Window)]
    if config.lpips_weights is not None:
        small = min((min(window.height, window.width) for window in known), default=MIN_SIZE)
        if small < MIN_SIZE:
            raise ConfigError(
                f"LPIPS needs frames of {MIN_SIZE}x{MIN_SIZE} pixels, but some have {small} on a "
                "side; give a larger --width, or leave --lpips_weights out."
            )
        lpips = load_lpips(Path(config.lpips_weights), device)
    if config.fvd_weights is not None:
        short = min((w.num_frames - w.skip for w in known), default=fvd.MIN_FRAMES)
        if short < fvd.MIN_FRAMES or len(known) < 2:
            raise ConfigError(
                f"rFVD needs at least 2 pairs of {fvd.MIN_FRAMES} frames, but here are "
                f"{len(known)}, the shortest of {short}; leave --fvd_weights out."
            )
        i3d = fvd.I3D(Path(config.fvd_weights), device)
    return Networks(lpips, i3d, device, threading.Lock())


def _settings(config: TokenBenchConfig, found: Pairs) -> dict[str, Any]:
    """All that decides the figures; a folder with others is another evaluation."""
    videos = [
        VideoSource(pair.name, path)
        for pair in found.pairs
        for path in (pair.reference, pair.target)
    ]
    weights = {
        "lpips_sha256": config.lpips_weights and _weights_sha256(Path(config.lpips_weights)),
        "fvd_sha256": config.fvd_weights and files.sha256_of_file(Path(config.fvd_weights)),
    }
    return {
        "recursive": config.recursive,
        "num_pairs": len(found.pairs),
        "videos_read_by": decoder_name(),
        "videos_sha256": sources_sha256(videos),
        "width": config.width,
        "num_frames": config.num_frames,
        "skip_frames": config.skip_frames,
        **weights,
    }


def _weights_sha256(folder: Path) -> str:
    return files.sha256_of_json(
        [files.sha256_of_file(path) for path in sorted(folder.glob("*.pth"))]
    )


def _check_results(config: TokenBenchConfig) -> None:
    """Refuses to replace results of another program; the folder's videos are no results.

    Raises:
        OutputFolderError: names the file.
    """
    folder = config.output
    is_ours = any((folder / name).is_file() for name in (METRICS_FILE, "evaluation.json"))
    theirs = [name for name in _PRODUCTS if (folder / name).exists()]
    if theirs and not is_ours and not config.overwrite:
        raise OutputFolderError(
            f"{folder / theirs[0]} is there already; name another folder with --output_dir, or "
            "replace it with --overwrite."
        )


def _score_all(
    config: TokenBenchConfig,
    pairs: Sequence[Pair],
    windows: Sequence[Window | VideoError],
    networks: Networks,
    folder: ResultFolder,
) -> None:
    """Adds a row for every pair that has none yet, in order."""
    num_done = len(folder.rows)
    if num_done:
        launch.say(f"continuing {config.output}: {num_done} videos are done.")
    progress, num_failed = ProgressDisplay(len(pairs), "videos", done=num_done), 0
    for scored in _in_order(pairs[num_done:], windows[num_done:], networks, config.num_workers):
        if "error" in scored.row:
            num_failed += 1
            progress.say(f"not read: {scored.row['error']}")
        folder.append(scored.row, scored.addends)
        progress.advance(f"{num_failed} failed" if num_failed else "")


def _in_order(
    pairs: Sequence[Pair],
    windows: Sequence[Window | VideoError],
    networks: Networks,
    num_workers: int,
) -> Iterator[_Scored]:
    """Scores as many pairs at a time, and no more than that ahead."""
    with ThreadPoolExecutor(num_workers) as pool:
        jobs = [(pair, window, networks) for pair, window in zip(pairs, windows, strict=True)]
        running = [pool.submit(_score, *job) for job in jobs[:num_workers]]
        try:
            for number in range(len(jobs)):
                yield running.pop(0).result()
                if number + num_workers < len(jobs):
                    running.append(pool.submit(_score, *jobs[number + num_workers]))
        finally:
            for future in running:
                future.cancel()


def _score(pair: Pair, window: Window | VideoError, networks: Networks) -> _Scored:
    """Compares one pair; a video that cannot be read becomes a row with its reason."""
    try:
        if isinstance(window, VideoError):
            raise window
        return _compare(pair, window, networks)
    except VideoError as error:
        return _Scored({"video": pair.name, "error": str(error)})


def _compare(pair: Pair, window: Window, networks: Networks) -> _Scored:
    errors, similarities, distances = [], [], []
    held: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]] = []
    for reference, target in iter_pair(pair, window):
        errors.append(quality.frame_error(reference, target))
        similarities.append(quality.frame_ssim(reference, target, channel_axis=-1))
        if networks.lpips is not None:
            distances.append(_lpips(networks, networks.lpips, reference, target))
        if networks.i3d is not None:
            held.append((reference, target))
    row = {
        "video": pair.name,
        "num_frames": len(errors),
        "height": window.height,
        "width": window.width,
        "psnr": quality.psnr_of(float(np.mean(errors))),
        "ssim": float(np.mean(similarities)),
    }
    if distances:
        row["lpips"] = float(np.mean(distances))
    if networks.i3d is None:
        return _Scored(row)
    with networks.lock:
        features = [networks.i3d(np.stack(clip)) for clip in zip(*held, strict=True)]
    return _Scored(row, fvd.moments(*features))


def _lpips(
    networks: Networks, network: LPIPS, first: NDArray[np.uint8], second: NDArray[np.uint8]
) -> float:
    frames = [
        to_float(torch.from_numpy(frame).to(networks.device)).permute(2, 0, 1)[None]
        for frame in (first, second)
    ]
    with networks.lock, torch.inference_mode():
        return float(network(*frames))


def _summary(
    config: TokenBenchConfig, found: Pairs, folder: ResultFolder, networks: Networks
) -> dict[str, Any]:
    rows = [row for row in folder.rows if "error" not in row]
    failures = [row for row in folder.rows if "error" in row]
    figures: dict[str, Any] = {"num_videos": len(rows), "num_failures": len(failures)}
    for name in _BY_CLIP:
        if rows and name in rows[0]:
            figures[name] = float(np.mean([row[name] for row in rows]))
    if networks.i3d is not None and len(rows) > 1:
        figures["rfvd"] = fvd.distance(folder.sums, len(rows))
    used = environment(networks.device) | {"videos_read_by": decoder_label()}
    whole = result("tokenbench", folder.settings, figures, rows, failures, used, folder.seconds)
    return whole | {
        "gtpath": config.gtpath,
        "targetpath": config.targetpath,
        "only_reference": found.only_reference,
        "only_target": found.only_target,
    }


def _write_tables(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The original tool's lists of [file name, value], and everything as a table."""
    for name in _BY_CLIP:
        if name in rows[0]:
            files.write_json(folder / f"{name}.json", [[row["video"], row[name]] for row in rows])
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    files.write_text(folder / _TABLE_FILE, text.getvalue())


def _report(metrics: dict[str, Any], config: TokenBenchConfig) -> None:
    """Says what came out, and raises if too many videos failed."""
    figures, failures = metrics["figures"], metrics["failures"]
    for side, names in (("gtpath", "only_reference"), ("targetpath", "only_target")):
        _say_unmatched(getattr(config, side), metrics[names])
    if not metrics["rows"]:
        reasons = " ".join(row["error"] for row in failures[:3])
        raise PartialFailureError(f"none of the pairs could be read: {reasons}")
    parts = [f"PSNR {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.4f}"]
    if "lpips" in figures:
        parts.append(f"LPIPS {figures['lpips']:.4f}")
    if "rfvd" in figures:
        parts.append(f"rFVD {figures['rfvd']:.1f}")
    launch.say(f"{figures['num_videos']} videos: {', '.join(parts)}: {config.output}")
    missing = [
        f"{name} needs {flag}"
        for name, flag in (("LPIPS", "--lpips_weights"), ("rFVD", "--fvd_weights"))
        if getattr(config, flag.removeprefix("--")) is None
    ]
    if missing:
        launch.say(f"note: {' and '.join(missing)} (see docs/evaluation.md).", error=True)
    if len(failures) > config.max_failures:
        raise PartialFailureError(
            f"{len(failures)} of {len(failures) + len(metrics['rows'])} pairs could not be read, "
            f"and max_failures is {config.max_failures}; the others are scored in {config.output}, "
            "and metrics.json there names each with its reason."
        )


def _say_unmatched(folder: str, names: Sequence[str]) -> None:
    if names:
        more = len(names) - _MAX_NAMED
        listed = ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
        launch.say(f"note: only in {folder}: {listed}.", error=True)
