"""Checkpoint formats: one file each, all of them listed in ``registry``.

A format says how it is recognised, where the model's numbers stand in it, which files make up a
checkpoint, and how its weights are read and, where it can be a conversion's target, written. To add
one, write its file and add it to the registry; nothing else in the package knows any format.
"""
