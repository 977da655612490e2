"""Starts a training run elsewhere through NeMo-Run: ``python -m cosmos_posttrain.submit``.

Flows in: where it is to run, and the training script's command line. Flows out: a run on this
machine, a Slurm job or a Kubernetes TrainJob; or, with ``--render``, what would be handed over.
``job`` checks the command, ``executors`` speaks to NeMo-Run (the extra ``launch``), the only file
that imports it. ``docs/launching.md`` has all ways to start a run, most of which need none of this.
"""
