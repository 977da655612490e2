"""Post-trains a Cosmos Video2World model (5B, 13B) on prepared video tokens with prompts."""

from cosmos_posttrain import cli, launch
from cosmos_posttrain.plan.command import FLAGS, TrainCommand, validate


def main() -> int:
    """Parses the command line, and trains or says what that would do."""
    command = cli.parse(TrainCommand, FLAGS, None, "train_video2world.py", __doc__)
    validate(command)
    if command.dry_run:
        from cosmos_posttrain.plan.dry_run import show

        return show(command, takes_text=True)
    if command.engine == "nemo":
        from cosmos_posttrain.nemo.engine import train
    else:
        from cosmos_posttrain.training.trainer import train
    train(command.run_config, takes_text=True)
    return 0


if __name__ == "__main__":
    launch.run_cli(main)
