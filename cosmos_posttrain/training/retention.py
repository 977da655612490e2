"""Which checkpoints of a run are kept. No torch.

Flows in: the validation losses of its checkpoints, oldest first. Flows out: which may go.
"""

from __future__ import annotations

from collections.abc import Sequence


def to_remove(
    losses: Sequence[float | None], save_top_k: int | None, keep_last_n: int | None
) -> list[int]:
    """Numbers of the checkpoints that need not be kept.

    Args:
        losses: validation loss of each checkpoint, oldest first; None where it was not measured.
        save_top_k: the best this many are kept; -1 keeps all.
        keep_last_n: the newest this many are kept; None is one.

    Returns:
        Ascending; empty where neither limit is given. The newest is never among them.
    """
    if save_top_k == -1 or (save_top_k is None and keep_last_n is None):
        return []
    count = len(losses)
    newest = range(max(count - (keep_last_n or 1), 0), count)
    known = sorted((loss, -number) for number, loss in enumerate(losses) if loss is not None)
    best = {-number for _, number in known[: save_top_k or 0]}
    return [number for number in range(count) if number not in newest and number not in best]
