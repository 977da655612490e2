"""How many files a process may have open, and what is said when there are too many. No torch.

Flows in: the process's limit (``ulimit -n``) and errors of the system. Flows out: the number of
shards that may be open at once, and one sentence where the limit was met after all.
"""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator

from cosmos_posttrain.errors import UserError

_MAX_OPEN_SHARDS = 256
_MIN_OPEN_SHARDS = 4
# Of all files that may be open, shards (two files each) take at most a quarter.
_SHARE_OF_LIMIT = 8


def max_open_files() -> int | None:
    """How many files this process may have open at once; None is without limit."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def max_open_shards() -> int:
    """How many shards are held open: a share of what the process may open, up to a cap."""
    limit = max_open_files()
    share = _MAX_OPEN_SHARDS if limit is None else limit // _SHARE_OF_LIMIT
    return max(_MIN_OPEN_SHARDS, min(_MAX_OPEN_SHARDS, share))


def is_too_many_files(error: BaseException) -> bool:
    """True where an error comes from a full table of open files, by itself or by its cause."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return True
        cause = cause.__cause__
    return False


@contextlib.contextmanager
def naming_limits(what: str) -> Iterator[None]:
    """Gives "too many open files" its own sentence, wherever in the block it came from.

    Args:
        what: what is being opened.

    Raises:
        UserError: this process, or the machine, has too many files open.
    """
    try:
        yield
    except (OSError, UserError) as error:
        if not is_too_many_files(error):
            raise
        raise UserError(
            f"{what} cannot be opened: all {max_open_files() or 'the'} files that this process may "
            "have open at once are in use; allow more with ulimit -n, 4096 say, and start again."
        ) from error
