"""Cosmos autoregressive models on Megatron-Core.

Flows in: a ``ModelConfig`` (from a preset, a checkpoint's context or a reference ``config.json``).
Flows out: a Megatron ``GPTModel`` with 3D RoPE, sharded over the tensor-parallel group.
"""
