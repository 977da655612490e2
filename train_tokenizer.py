"""Trains a discrete video tokenizer; see docs/tokenizer_training.md."""

from cosmos_posttrain import cli, launch
from cosmos_posttrain.tokenizer_training.config import FLAGS, TokenizerTrainConfig


def main() -> None:
    """Parses the command line and trains."""
    config = cli.parse(TokenizerTrainConfig, FLAGS, None, "train_tokenizer.py", __doc__)
    from cosmos_posttrain.tokenizer_training.trainer import train

    train(config)


if __name__ == "__main__":
    launch.run_cli(main)
