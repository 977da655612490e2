"""A model's rows for another tokenizer's tokens, made from its rows for the old ones.

Flows in: the same videos as tokens of both tokenizers, and a checkpoint. Flows out: how much new
and old tokens overlap (``counting``, one file), and embeddings and output rows for the
new vocabulary (``embedding``). docs/embedding_transfer.md has the maths.
"""
