"""Plans a training run before any GPU is rented: ``python -m cosmos_posttrain.plan``.

Flows in: a model, a number of GPUs, their memory and a clip's token grid. Flows out: parameters,
memory per GPU, the layouts that fit with their expected speed, and the command line of the best.
``parameters`` counts, ``memory`` and ``speed`` estimate one layout, ``layouts`` searches,
``report`` prints. The formulas and what was measured stand in ``docs/plan.md``.
"""
