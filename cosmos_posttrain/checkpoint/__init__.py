"""Checkpoints in and out of every form that Cosmos models come in.

Flows in: a path (``model.pt`` or safetensors with ``config.json``, a run's checkpoint, a run
folder, a NeMo 2 or Megatron folder, ``random:size``). Flows out: a Megatron model with those
weights on this rank, or a folder in another form. Nothing in a checkpoint is executed.
"""
