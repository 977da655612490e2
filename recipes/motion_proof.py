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


def ask(frames: torch.Tensor, seed: int, sampling: dict[str, Any]) -> Request:
    """The first frames of a clip."""
    return Request(frames=frames[:, :NUM_GIVEN], seed=seed, **sampling)


def measure(
    session: Session, videos: list[Path], sampling: dict[str, Any], label: str
) -> dict[str, Any]:
    """Continues every clip and finds its object; also what the tokenizer alone makes of the clip.

    Returns:
        ``generated`` and ``reconstructed``: errors in pixels, and ``not_found``: of the generated
        ones.
    """
    progress = ProgressDisplay(len(videos), "clips", label)
    result: dict[str, Any] = {"generated": [], "reconstructed": [], "not_found": 0}
    for number, video in enumerate(videos):
        truth = WorldTruth.load(truth_path(video))
        true_frames = read_frames(video, truth)
        reconstructed = session.decode(session.encode(true_frames))
        frames = session.generate(ask(true_frames, number, sampling)).frames
        for name, clip in (("generated", frames), ("reconstructed", reconstructed)):
            found = locate(clip.permute(1, 2, 3, 0).numpy(), truth)
            result[name] += last_errors(found, truth).tolist()
            if name == "generated":
                result["not_found"] += int(np.isnan(found[-1]).any(axis=-1).sum())
        progress.advance()
    return result


def measured(
    session: Session, videos: list[Path], sampling: dict[str, Any], label: str, folder: Path
) -> dict[str, Any]:
    """``measure``, or what an earlier run of this script wrote of the same clips."""
    path = folder / f"motion_{label}.json"
    truth = WorldTruth.load(truth_path(videos[0]))
    first = ask(read_frames(videos[0], truth), 0, sampling)
    made_by = {"first": session.settings_of(first), "num_videos": len(videos)}
    done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if done.get("made_by") != json.loads(files.json_text(made_by)):
        done = {"made_by": made_by, **measure(session, videos, sampling, label)}
        files.write_json(path, done)
    return done


def read_frames(video: Path, truth: WorldTruth) -> torch.Tensor:
    """All frames of a clip, (3, T, H, W) uint8."""
    return read_clips(video, [0], len(truth.positions), truth.height, truth.width)[0].frames


def row(label: str, errors: list[float], not_found: int | None = None) -> str:
    """A line of the table."""
    quantiles = np.quantile(errors, [0.5, 0.9])
    missing = "" if not_found is None else f"{not_found} of {len(errors)}"
    return f"| {label} | {quantiles[0]:.2f} | {quantiles[1]:.2f} | {missing} |"


def draw(
    videos: list[Path], sessions: dict[str, Session], sampling: dict[str, Any], path: Path
) -> None:
    """The first clips as they are and as they were generated, from the last given frame on."""
    columns = {}
    for number, video in enumerate(videos[:NUM_PICTURED]):
        frames = read_frames(video, WorldTruth.load(truth_path(video)))
        columns[f"clip {number + 1}"] = frames
        for label, session in sessions.items():
            clip = session.generate(ask(frames, number, sampling))
            columns[f"{number + 1}: {label}"] = clip.frames
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
    args.output.mkdir(parents=True, exist_ok=True)
    sessions = {
        label: Session(SessionConfig(ar_model_dir=run))
        for label, _, run in (pair.partition("=") for pair in args.runs)
    }
    results = {
        label: measured(session, videos, sampling, label, args.output)
        for label, session in sessions.items()
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
    summary = {
        "world": json.loads((args.world / "world.json").read_text(encoding="utf-8")),
        "split": args.split,
        "num_given": NUM_GIVEN,
        "sampling": sampling,
        "yardsticks": guesses,
        "runs": results,
        "medians": {
            **{name: median(errors) for name, errors in guesses.items()},
            **{label: median(result["generated"]) for label, result in results.items()},
        },
    }
    files.write_json(args.output / "motion.json", summary)
    files.write_text(args.output / "motion.md", "\n".join(lines) + "\n")
    draw(videos, sessions, sampling, args.output / "motion.jpg")
    print("\n".join(lines))


if __name__ == "__main__":
    run_cli(main)
