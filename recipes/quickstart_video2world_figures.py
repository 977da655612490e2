"""The Video2World quickstart's case, its picture, and how many clips follow their captions."""

import argparse
import json
from pathlib import Path

import torch

from cosmos_posttrain.evaluation.figures import side_by_side
from cosmos_posttrain.evaluation.following import Share, follows, locate
from cosmos_posttrain.evaluation.world_truth import WorldTruth, truth_path
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.video import list_videos, read_clips

DIRECTIONS = ("left", "right")


def choose(world: Path) -> tuple[Path, list[str]]:
    """The first held-out clip, and two prompts for its ball that differ in a word."""
    video = list_videos(world / "videos" / "val")[0]
    ball = WorldTruth.load(truth_path(video)).objects[0]
    return video, [f"The {ball.color} {ball.shape} moves {name}." for name in DIRECTIONS]


def read_clip(path: Path, truth: WorldTruth) -> torch.Tensor:
    """(3, T, H, W) uint8."""
    return read_clips(path, [0], len(truth.positions), truth.height, truth.width)[0].frames


def draw(world: Path, output: Path) -> None:
    """The two videos side by side, and by how much they differ."""
    video, prompts = choose(world)
    truth = WorldTruth.load(truth_path(video))
    clips = [read_clip(output / f"prompt_{number}.mp4", truth) for number in (1, 2)]
    given = truth.still_frames
    change = float((clips[0][:, given:].float() - clips[1][:, given:].float()).abs().mean())
    last = len(truth.positions) - 1
    frames = [0, given - 1, given + 1, (given + last) // 2, last]
    captions = {frame: "given" if frame < given else "generated" for frame in frames}
    picture = output / "side_by_side.png"
    side_by_side(dict(zip(prompts, clips, strict=True)), picture, frames, captions)
    if change == 0:
        print("both prompts gave the same video: the model has not learnt yet to tell them apart")
    else:
        print(f"the two videos differ by {change:.2f} of 255 in the generated frames")


def count(world: Path, output: Path) -> Share:
    """How many of the generated clips go where their captions say."""
    lines = (world / "prompts_val.jsonl").read_text(encoding="utf-8").splitlines()
    hits = 0
    for line in lines:
        video = world / json.loads(line)["visual_input"]
        truth = WorldTruth.load(truth_path(video))
        clip = read_clip(output / "held_out" / f"{video.parent.name}_rgb.mp4", truth)
        found = locate(clip.permute(1, 2, 3, 0).numpy(), truth)
        hits += follows(found, truth, [truth.objects[0].direction], truth.still_frames)
    return Share(hits, len(lines))


def main() -> None:
    """Prints the case, or draws and counts in a finished quickstart folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world", type=Path, required=True)
    parser.add_argument("--choose", action="store_true", help="print a video and two prompts")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.choose:
        video, prompts = choose(args.world)
        print(video, *prompts, sep="\n")
        return
    if args.output is None:
        parser.error("give --choose, or --output of a finished quickstart")
    torch.set_num_threads(2)
    draw(args.world, args.output)
    share = count(args.world, args.output)
    low, high = share.interval
    print(
        f"{share.hits} of {share.total} held-out clips follow their caption: {share.value:.0%} "
        f"(95% interval {low:.0%} to {high:.0%}; chance 25%)"
    )


if __name__ == "__main__":
    run_cli(main)
