"""Starts a recipe of this folder here, on Slurm or on Kubernetes: ``launch.py MODEL FLAGS -- ...``.

Flows in: a model's name, flags of ``python -m cosmos_posttrain.submit``, and behind ``--`` flags of
the training script. Flows out: a job; or, with ``--render``, what would be handed over.
"""

from __future__ import annotations

import importlib
import sys

from cosmos_posttrain import cli
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.launch import run_cli, say
from cosmos_posttrain.nemo import recipe
from cosmos_posttrain.submit import config as submission
from cosmos_posttrain.submit.job import in_repository
from cosmos_posttrain.training import config as training

MODELS = ("cosmos_4b", "cosmos_12b", "cosmos_5b_video2world", "cosmos_13b_video2world")


def main() -> int:
    """Starts or renders a job; returns the exit code."""
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    name, flags = "".join(words[:1]), words[1:place]
    if name in ("-h", "--help"):
        say(f"{__doc__}\nModels: {', '.join(MODELS)}; launch.py MODEL --help names the flags.")
        return 0
    if name not in MODELS:
        raise ConfigError(f"there is no recipe {name!r}; name one of {', '.join(MODELS)} first.")
    where = cli.parse(
        submission.SubmitConfig, submission.FLAGS, flags, f"recipes/nemo/launch.py {name}", ""
    )
    submission.validate(where)
    from cosmos_posttrain.submit import executors

    recipe.nemo_run_module()
    model = importlib.import_module(name).MODEL
    shipped = model.config_file(where.nodes * where.gpus_per_node)
    # NeMo's loop waits for its checkpoints and for the updated weights.
    switches = ["--no-async_save", "--no-overlap_param_gather"]
    arguments = ["--config", str(shipped), *switches, *words[place + 1 :]]
    config = cli.parse(training.TrainConfig, training.FLAGS, arguments, "... --", "")
    training.validate(config, where.nodes * where.gpus_per_node)
    partial = recipe.make_recipe(config, model.takes_text, where.nodes, where.gpus_per_node)
    job = in_repository(where, recipe.command(partial, where.name))
    if where.render:
        say(executors.render(where, job))
        return 0
    return executors.submit(where, job)


if __name__ == "__main__":
    run_cli(main)
