"""How far from the truth generated objects end: table, figures and picture of motion_proof.sh."""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from cosmos_posttrain import files
from cosmos_posttrain.errors import UserError
from cosmos_posttrain.evaluation.figures import side_by_side
from cosmos_posttrain.evaluation.following import last_errors, locate, yardsticks
from cosmos_posttrain.evaluation.world_truth import WorldTruth, truth_path
from cosmos_posttrain.inference.config import SessionConfig
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.video import list_videos, read_clips

NUM_GIVEN = 9
NUM_PICTURED = 3


def measure(run: Path, videos: list[Path], sampling: dict[str, Any], label: str) -> dict[str, Any]:
    """Continues every clip and finds its object; also what the tokenizer alone makes of the clip.

    Returns:
        ``generated`` and ``reconstructed``: errors in pixels, ``not_found``: of the generated
        ones, and ``frames`` of the first clips, (3, T, H, W) uint8.
    """
    session = Session(SessionConfig(ar_model_dir=str(run)))
    progress = ProgressDisplay(len(videos), "clips", label)
    result: dict[str, Any] = {"generated": [], "reconstructed": [], "not_found": 0, "frames": []}
    for number, video in enumerate(videos):
        truth = WorldTruth.load(truth_path(video))
        true_frames = read_frames(video, truth)
        reconstructed = session.decode(session.encode(true_frames))
        request = Request(frames=true_frames[:, :NUM_GIVEN], seed=number, **sampling)
        frames = session.generate(request).frames
        for name, clip in (("generated", frames), ("reconstructed", reconstructed)):
            found = locate(clip.permute(1, 2, 3, 0).numpy(), truth)
            result[name] += last_errors(found, truth).tolist()
            if name == "generated":
                result["not_found"] += int(np.isnan(found[-1]).any(axis=-1).sum())
        if number < NUM_PICTURED:
            result["frames"].append(frames)
        progress.advance()
    return result


def read_frames(video: Path, truth: WorldTruth) -> torch.Tensor:
    """All frames of a clip, (3, T, H, W) uint8."""
    return read_clips(video, [0], len(truth.positions), truth.height, truth.width)[0].frames


def row(label: str, errors: list[float], not_found: int | None = None) -> str:
    """A line of the table."""
    quantiles = np.quantile(errors, [0.5, 0.9])
    missing = "" if not_found is None else f"{not_found} of {len(errors)}"
    return f"| {label} | {quantiles[0]:.2f} | {quantiles[1]:.2f} | {missing} |"


def draw(videos: list[Path], results: dict[str, dict[str, Any]], path: Path) -> None:
    """The first clips as they are and as they were generated, from the last given frame on."""
    columns = {}
    for number, video in enumerate(videos[:NUM_PICTURED]):
        columns[f"clip {number + 1}"] = read_frames(video, WorldTruth.load(truth_path(video)))
        for label, result in results.items():
            columns[f"{number + 1}: {label}"] = result["frames"][number]
    last = next(iter(columns.values())).shape[1] - 1
    frames = [NUM_GIVEN - 1, *np.linspace(NUM_GIVEN, last, 4).round().astype(int).tolist()]
    captions = {frame: "given" if frame < NUM_GIVEN else "generated" for frame in frames}
    side_by_side(columns, path, frames, captions)


def main() -> None:
    """Measures every run on the same held-out clips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--num_videos", type=int, default=60)
    parser.add_argument("--runs", nargs="+", required=True, help="LABEL=RUN")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top_p", type=float)
    parser.add_argument("--output", type=Path, required=True, help="folder of motion.md and others")
    args = parser.parse_args()
    torch.set_num_threads(1)
    videos = list_videos(args.world / "videos" / args.split)[: args.num_videos]
    if len(videos) < max(args.num_videos, NUM_PICTURED):
        raise UserError(f"{args.world} has {len(videos)} {args.split} clips; render more.")
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    results = {
        label: measure(Path(run), videos, sampling, label)
        for label, _, run in (pair.partition("=") for pair in args.runs)
    }
    guesses: dict[str, list[float]] = {"repeat": [], "extrapolate": []}
    for video in videos:
        for name, errors in yardsticks(WorldTruth.load(truth_path(video)), NUM_GIVEN).items():
            guesses[name] += errors.tolist()
    lines = [
        "| position in the last frame | median error, px | 90%, px | not found |",
        "|---|---|---|---|",
        row("the last given frame, repeated", guesses["repeat"]),
        row("true positions, extrapolated at their last velocity", guesses["extrapolate"]),
    ]
    for label, result in results.items():
        lines.append(row(f"{label}: generated", result["generated"], result["not_found"]))
        lines.append(row(f"{label}: the true clip, reconstructed", result["reconstructed"]))
    plain = {
        label: {key: value for key, value in result.items() if key != "frames"}
        for label, result in results.items()
    }
    summary = {
        "world": json.loads((args.world / "world.json").read_text(encoding="utf-8")),
        "split": args.split,
        "num_given": NUM_GIVEN,
        "sampling": sampling,
        "yardsticks": guesses,
        "runs": plain,
        "medians": {
            **{name: median(errors) for name, errors in guesses.items()},
            **{label: median(result["generated"]) for label, result in results.items()},
        },
    }
    args.output.mkdir(parents=True, exist_ok=True)
    files.write_json(args.output / "motion.json", summary)
    files.write_text(args.output / "motion.md", "\n".join(lines) + "\n")
    draw(videos, results, args.output / "motion.jpg")
    print("\n".join(lines))


if __name__ == "__main__":
    run_cli(main)
