"""Checkpoints in and out of every form that Cosmos models come in.

Flows in: a path (``model.pt`` + ``config.json``, a run's checkpoint, a run folder,
``random:size``). Flows out: a Megatron model with those weights on this rank, or a folder in
another form.
"""
