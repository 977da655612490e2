"""Clips that a model generates, scored against what really came.

Flows in: a model and one split of a data set. Flows out: clips, and scores between floors and a
ceiling.

Modules: ``command`` is a run of ``evaluate.py generate``, ``inputs`` opens what it needs and gives
the clips' truths, ``scores`` compares one clip, ``summary`` all; ``guesses`` are continuations
without a model, ``sampson`` measures 3D consistency.
"""
