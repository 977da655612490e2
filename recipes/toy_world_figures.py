"""How well tokenizers keep the objects of small worlds: a table, and a picture of clips."""

import argparse
from pathlib import Path

import numpy as np
import torch

from cosmos_posttrain.evaluation.figures import contact_sheet
from cosmos_posttrain.evaluation.positions import find_objects
from cosmos_posttrain.evaluation.world_truth import WorldTruth, truth_path
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.runlog import ProgressDisplay
from cosmos_posttrain.tokenizer import SHIPPED, load_tokenizer
from cosmos_posttrain.video import list_videos, read_clips, to_float, to_uint8

# Objects that are less visible count in none of the figures.
MIN_VISIBLE = 0.9


def read(video: Path, truth: WorldTruth) -> torch.Tensor:
    """All frames of a clip, (3, T, H, W) uint8."""
    return read_clips(video, [0], len(truth.positions), truth.height, truth.width)[0].frames


@torch.no_grad()
def reconstruct(name: str, frames: torch.Tensor) -> torch.Tensor:
    """What a tokenizer makes of a clip, (3, T, H, W) uint8; itself without one."""
    if not name:
        return frames
    tokenizer = load_tokenizer(name, device="cpu")
    return to_uint8(tokenizer.decode(tokenizer.encode(to_float(frames)[None]))[0])


def measure(name: str, videos: list[Path], label: str) -> str:
    """A row of the table."""
    progress = ProgressDisplay(len(videos), "clips", label)
    distances = []
    for video in videos:
        truth = WorldTruth.load(truth_path(video))
        frames = reconstruct(name, read(video, truth)).permute(1, 2, 3, 0).numpy()
        found = find_objects(frames, truth.colors, truth.diameters)
        visible = truth.visible >= MIN_VISIBLE
        distances.append(np.hypot(*np.moveaxis(found - truth.positions, -1, 0))[visible])
        progress.advance()
    all_distances = np.concatenate(distances)
    is_found = np.isfinite(all_distances)
    near = np.mean(np.where(is_found, all_distances, np.inf) <= 5)
    median, ninth = np.quantile(all_distances[is_found], [0.5, 0.9])
    return f"| {label} | {is_found.mean():.1%} | {median:.2f} | {ninth:.2f} | {1 - near:.1%} |"


def main() -> None:
    """Measures every world with every tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("worlds", nargs="+", type=Path, help="folders of toy_world")
    parser.add_argument("--max_videos", type=int, default=60, help="of each world")
    parser.add_argument("--tokenizers", default=",".join(SHIPPED.values()))
    parser.add_argument("--picture", type=Path, help="PNG with a clip of each world")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.tokenizers.split(",")
    print("| | found | median, px | 90%, px | missing or 5 px off |\n|---|---|---|---|---|")
    pictures = []
    for world in args.worlds:
        videos = list_videos(world / "videos")[: args.max_videos]
        for name in ["", *names]:
            print(measure(name, videos, f"{world.name}, {name or 'as it is'}"), flush=True)
        truth = WorldTruth.load(truth_path(videos[0]))
        frames = read(videos[0], truth)
        pictures.append((world.name, frames, reconstruct(names[0], frames)))
    if args.picture:
        contact_sheet(pictures, args.picture, f"reconstructed by {names[0]}")


if __name__ == "__main__":
    run_cli(main)
