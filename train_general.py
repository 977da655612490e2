"""Post-trains a Cosmos autoregressive base model (4B, 12B) on prepared video tokens."""

from cosmos_posttrain import cli, launch
from cosmos_posttrain.training.config import FLAGS, TrainConfig


def main() -> None:
    """Parses the command line and trains."""
    config = cli.parse(TrainConfig, FLAGS, None, "train_general.py", __doc__)
    from cosmos_posttrain.training.trainer import train

    train(config)


if __name__ == "__main__":
    launch.run_cli(main)
