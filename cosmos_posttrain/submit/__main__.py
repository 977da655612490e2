"""The command line of jobs: ``python -m cosmos_posttrain.submit FLAGS -- train_general.py ...``.

Flows in: flags, and behind ``--`` the training command. Flows out: a job, or what would be one.
"""

from __future__ import annotations

import sys

from cosmos_posttrain.cli import parse
from cosmos_posttrain.launch import run_cli, say
from cosmos_posttrain.submit.config import FLAGS, SubmitConfig, validate
from cosmos_posttrain.submit.job import make_job


def main() -> int:
    """Starts or renders a job; returns the exit code."""
    words = sys.argv[1:]
    place = words.index("--") if "--" in words else len(words)
    description = "Starts a training run here, on Slurm or on Kubernetes, through NeMo-Run."
    name = "python -m cosmos_posttrain.submit"
    config = parse(SubmitConfig, FLAGS, words[:place], name, description)
    validate(config)
    job = make_job(config, words[place + 1 :])
    from cosmos_posttrain.submit import executors

    if config.render:
        say(executors.render(config, job))
        return 0
    return executors.submit(config, job)


if __name__ == "__main__":
    run_cli(main)
