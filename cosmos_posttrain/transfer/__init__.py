"""A model's rows for another tokenizer's tokens, made from its rows for the old ones.

Flows in: the same videos as tokens of both tokenizers, and a checkpoint. Flows out: how much new
and old tokens overlap, in one file, and embeddings and output rows for the new vocabulary.
docs/embedding_transfer.md has the maths.

    align         the command: two prepared folders -> the file
    counting      which tokens of clips lie over each other (``overlap``: where and when)
    cooccurrence  the file
    rows          the file and the old rows -> new rows
    pursuit       the same, as sparse combinations
    digits        the old rows and both tokenizers' levels -> new rows
    embedding     a checkpoint and a kind of start -> the weights of a built model
    advice        what the user is told of it
"""
