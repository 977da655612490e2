"""Whether generated clips follow their captions: tables and picture of video2world_proof.sh."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cosmos_posttrain import files
from cosmos_posttrain.errors import UserError
from cosmos_posttrain.evaluation.figures import side_by_side
from cosmos_posttrain.evaluation.following import (
    Share,
    chance_interval,
    directions_taken,
    follows,
    last_errors,
    locate,
)
from cosmos_posttrain.evaluation.world_truth import WorldTruth, truth_path
from cosmos_posttrain.inference.config import SessionConfig
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.video import list_videos, read_clips

DIRECTIONS = ("left", "right", "up", "down")


class Case(NamedTuple):
    """A held-out clip: what is given of it, and all that is known."""

    name: str
    given: torch.Tensor
    truth: WorldTruth

    @property
    def direction(self) -> str:
        """Where its caption says that it goes."""
        return self.truth.objects[0].direction


def choose_cases(world: Path, split: str, count: int) -> list[Case]:
    """The first clips of the split, equally many for each direction."""
    each, rest = divmod(count, len(DIRECTIONS))
    taken: Counter[str] = Counter()
    cases = []
    for video in list_videos(world / "videos" / split):
        truth = WorldTruth.load(truth_path(video))
        direction = truth.objects[0].direction
        if taken[direction] < each:
            taken[direction] += 1
            clip = read_clips(video, [0], truth.still_frames, truth.height, truth.width)[0]
            cases.append(Case(video.parent.name, clip.frames, truth))
    if rest or len(cases) < count:
        raise UserError(
            f"{world} has {dict(taken)} {split} clips; give a multiple of {len(DIRECTIONS)}, or "
            "render more."
        )
    return cases


def ask(case: Case, prompt: str, seed: int, settings: dict[str, Any]) -> Request:
    """The case's first frames, and a text that says what follows them."""
    return Request(frames=case.given, prompt=prompt, seed=seed, **settings)


def run_cases(
    session: Session,
    cases: Sequence[Case],
    order: Sequence[int],
    settings: dict[str, Any],
    label: str,
) -> list[dict[str, Any]]:
    """Generates each case with the caption of the case that ``order`` gives it; a row a case."""
    progress = ProgressDisplay(len(cases), "clips", label)
    rows = []
    for number, (case, other) in enumerate(zip(cases, order, strict=True)):
        source, given = cases[other], case.truth.still_frames
        frames = session.generate(ask(case, source.truth.caption, number, settings)).frames
        found = locate(frames.permute(1, 2, 3, 0).numpy(), case.truth)
        rows.append(
            {
                "clip": case.name,
                "caption": source.truth.caption,
                "own_direction": case.direction,
                "given_direction": source.direction,
                "taken": directions_taken(found, case.truth, given)[0],
                "is_found": bool(np.isfinite(found[-1]).all()),
                "follows_own": follows(found, case.truth, [case.direction], given),
                "follows_given": follows(found, case.truth, [source.direction], given),
                "error_to_own": last_errors(found, case.truth)[0],
            }
        )
        progress.advance()
    return rows


def share(rows: list[dict[str, Any]], key: str) -> str:
    """Of the cases, with its interval."""
    found = Share(sum(row[key] for row in rows), len(rows))
    low, high = found.interval
    return f"{found.hits} of {found.total}, {found.value:.1%} ({low:.1%} to {high:.1%})"


def main_table(results: dict[float, dict[str, list[dict[str, Any]]]]) -> list[str]:
    """A line for each guidance scale."""
    lines = [
        "| guidance | own caption: follows it | random other caption: goes where the clip's own "
        "says | of this, chance has | random other caption: follows that one | not found |",
        "|---|---|---|---|---|---|",
    ]
    for scale, orders in results.items():
        own, permuted = orders["own"], orders["permuted"]
        low, high = chance_interval(
            [row["taken"] for row in permuted], [row["own_direction"] for row in permuted]
        )
        missing = sum(not row["is_found"] for row in own + permuted)
        lines.append(
            f"| {scale:g} | {share(own, 'follows_own')} | {share(permuted, 'follows_own')} | "
            f"{low:.1%} to {high:.1%} | {share(permuted, 'follows_given')} | "
            f"{missing} of {len(own) + len(permuted)} |"
        )
    return lines


def direction_table(rows: list[dict[str, Any]]) -> list[str]:
    """Where the caption says, and where the object went."""
    lines = [f"| | {' | '.join(DIRECTIONS)} | nowhere |", f"|{'---|' * (len(DIRECTIONS) + 2)}"]
    for said in DIRECTIONS:
        taken = Counter(row["taken"] for row in rows if row["given_direction"] == said)
        numbers = " | ".join(str(taken[name]) for name in (*DIRECTIONS, ""))
        lines.append(f"| {said} | {numbers} |")
    return lines


def draw(session: Session, case: Case, settings: dict[str, Any], path: Path) -> None:
    """The same first frames with four captions that differ in one word."""
    item = case.truth.objects[0]
    prompts = {name: f"The {item.color} {item.shape} moves {name}." for name in DIRECTIONS}
    columns = {
        prompt: session.generate(ask(case, prompt, 0, settings)).frames
        for prompt in prompts.values()
    }
    given, total = case.truth.still_frames, len(case.truth.positions)
    frames = [0, given - 1, *np.linspace(given + 1, total - 1, 3).round().astype(int).tolist()]
    captions = {frame: "given" if frame < given else "generated" for frame in frames}
    side_by_side(columns, path, frames, captions)


def main() -> None:
    """Generates what is not there yet, then writes video2world.md, .json and .jpg."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--num_cases", type=int, default=60)
    parser.add_argument("--guidance_scales", default="1,2,4")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top_p", type=float, default=0.8)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = choose_cases(args.world, args.split, args.num_cases)
    orders = {
        "own": list(range(len(cases))),
        "permuted": np.random.default_rng(0).permutation(len(cases)).tolist(),
    }
    session = Session(SessionConfig(ar_model_dir=args.run))
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[float, dict[str, list[dict[str, Any]]]] = {}
    for scale in [float(part) for part in args.guidance_scales.split(",")]:
        settings = {**sampling, "guidance_scale": scale}
        results[scale] = {}
        for name, order in orders.items():
            path = args.output / f"guidance_{scale:g}_{name}.json"
            first = ask(cases[0], cases[order[0]].truth.caption, 0, settings)
            made_by = {"first": session.settings_of(first), "num_cases": len(cases)}
            done = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if done.get("made_by") != json.loads(files.json_text(made_by)):
                label = f"guidance {scale:g}, {name} captions"
                rows = run_cases(session, cases, order, settings, label)
                done = {"made_by": made_by, "cases": rows}
                files.write_json(path, done)
            results[scale][name] = done["cases"]
    plain = next(iter(results.values()))
    lines = [*main_table(results), "", *direction_table(plain["own"] + plain["permuted"])]
    summary = {
        "world": json.loads((args.world / "world.json").read_text(encoding="utf-8")),
        "split": args.split,
        "sampling": sampling,
        "guidance_scales": [
            {
                "guidance_scale": scale,
                "share_that_follows": np.mean([row["follows_own"] for row in rows["own"]]),
                "share_with_permuted_captions": np.mean(
                    [row["follows_own"] for row in rows["permuted"]]
                ),
                "share_that_follows_the_permuted_caption": np.mean(
                    [row["follows_given"] for row in rows["permuted"]]
                ),
            }
            for scale, rows in results.items()
        ],
    }
    files.write_json(args.output / "video2world.json", summary)
    files.write_text(args.output / "video2world.md", "\n".join(lines) + "\n")
    scale = float(args.guidance_scales.split(",")[0])
    draw(session, cases[0], {**sampling, "guidance_scale": scale}, args.output / "video2world.jpg")
    print("\n".join(lines))


if __name__ == "__main__":
    run_cli(main)
