"""Post-trains a Cosmos Video2World model (5B, 13B) on prepared video tokens with prompts."""

from cosmos_posttrain import cli, launch
from cosmos_posttrain.training.config import FLAGS, TrainConfig


def main() -> None:
    """Parses the command line and trains."""
    config = cli.parse(TrainConfig, FLAGS, None, "train_video2world.py", __doc__)
    from cosmos_posttrain.training.trainer import train

    train(config, takes_text=True)


if __name__ == "__main__":
    launch.run_cli(main)
