"""The quickstart's pictures and figures: what went in, what the tokenizer keeps, what came out."""

import argparse
from pathlib import Path

import torch

from cosmos_posttrain import load_tokenizer
from cosmos_posttrain.errors import CosmosPosttrainError
from cosmos_posttrain.evaluation.figures import loss_curves, read_metrics, side_by_side
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.video import read_input, to_float, to_uint8


def check_generation(generated: torch.Tensor, last_input: torch.Tensor) -> str:
    """Says how much the generated frames move; refuses a constant colour or a frozen frame.

    Args:
        generated: (3, T, H, W) uint8.
        last_input: (3, H, W) uint8, the frame before the first generated one.
    """
    contrast = float(generated.float().std(dim=(2, 3)).mean())
    change = float((generated.float() - last_input[:, None].float()).abs().mean())
    if contrast < 5 or change < 0.5:
        raise CosmosPosttrainError(
            f"the generated frames have contrast {contrast:.1f} and differ from the last input "
            f"frame by {change:.2f} of 255; a working model shows more than 5 and 0.5."
        )
    return (
        f"generated frames: contrast {contrast:.1f}, mean distance to the last input frame "
        f"{change:.1f} (of 255)"
    )


def main() -> None:
    """Draws everything for one finished quickstart folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--video", required=True)
    parser.add_argument("--num_frames", type=int, required=True)
    parser.add_argument("--num_input_frames", type=int, required=True)
    parser.add_argument("--height", type=int, required=True)
    parser.add_argument("--width", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(2)

    source = read_input(args.video, args.num_frames, args.height, args.width).frames
    generated = read_input(
        args.output / "generated.mp4", args.num_frames, args.height, args.width
    ).frames
    tokenizer = load_tokenizer("tiny-dv4x8x8")
    tokens = tokenizer.encode(to_float(source)[None])
    reconstruction = to_uint8(tokenizer.decode(tokens)[0])

    first = args.num_input_frames
    frames = [0, first - 1, first + 1, (first + args.num_frames) // 2, args.num_frames - 1]
    captions = {f: "given" if f < first else "generated" for f in frames}
    side_by_side(
        {"input": source, "reconstruction": reconstruction, "generation": generated},
        args.output / "side_by_side.png",
        frames,
        captions,
    )
    runs = {"post-trained": args.output / "run_new", "fresh weights": args.output / "run_fresh"}
    loss_curves(runs, args.output / "loss_curve.png", "the same new tokens, the same steps")
    for label, run in runs.items():
        rows = read_metrics(run)
        losses = [row["reduced_train_loss"] for row in rows]
        last = losses[-min(20, len(losses) // 2) :]
        start, end = sum(losses[:5]) / 5, sum(last) / len(last)
        print(
            f"{label}: training loss {start:.3f} -> {end:.3f} nats/token (first 5, last "
            f"{len(last)} steps), {1 - end / start:.0%} lower; validation "
            f"{rows[-1].get('val_loss', float('nan')):.3f}"
        )
    print(check_generation(generated[:, first:], source[:, first - 1]))


if __name__ == "__main__":
    run_cli(main)
