"""The processes of a job as each of them sees the others: where they run, and whether they live.

Flows in: one call on all ranks. Flows out: host and process of each rank, the same on all.
"""

from __future__ import annotations

import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Peer:
    """One process.

    Attributes:
        rank: its number.
        host: the machine's name.
        namespace: equal for processes that can see one another's process ids.
        process: its id there.
    """

    rank: int
    host: str
    namespace: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.process} on {self.host})"

    def is_dead(self) -> bool:
        """True where the process has certainly ended; asked of one in the same namespace."""
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        try:
            state = Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return False
        return state in "ZX"  # ended, and its parent has not asked for the exit code yet


def meet(rank: int) -> tuple[list[Peer], str]:
    """All processes of the job by rank, and a word that no other start of it has; all ranks call.

    Args:
        rank: this process's.
    """
    host = socket.gethostname()
    try:
        namespace = f"{host} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        namespace = host
    own = (Peer(rank, host, namespace, os.getpid()), secrets.token_hex(8))
    found = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own)
    return [peer for peer, _ in found], found[0][1]
