"""The figures in the documents that a CPU can remake: each with its command, value and tolerance.

Flows in: ``figures.yaml`` and a checkout of the repository. Flows out: whether they hold here.
"""
