"""Evaluation: how much a tokenizer keeps, and pictures of what a model sees, makes and learns.

Flows in: tokenizers, videos and training runs. Flows out: ``metrics.json`` and figures.
"""
