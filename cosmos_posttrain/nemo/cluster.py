"""The processes of a run, in the form in which Lightning asks for them.

Flows in: ``launch``. Flows out: a Lightning plugin. Without one Lightning looks for launchers
itself: within an allocation of Slurm's it takes every process for one of srun's, compares the run
with the allocation, and answers SIGUSR1 by a job of its own.
"""

from __future__ import annotations

import os

from cosmos_posttrain import launch
from cosmos_posttrain.nemo.bases import ClusterEnvironment


class LaunchedProcesses(ClusterEnvironment):
    """Ranks as ``launch`` gives them; the process groups exist.

    Args:
        num_per_node: processes of each machine.
    """

    def __init__(self, num_per_node: int) -> None:
        super().__init__()
        self._num_per_node = num_per_node

    @property
    def creates_processes_externally(self) -> bool:
        """All processes run already."""
        return True

    @property
    def main_address(self) -> str:
        """Where the processes met."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """The port there; 0 for a process alone, which met nobody."""
        return int(os.environ.get("MASTER_PORT", 0))

    @staticmethod
    def detect() -> bool:
        """Always: it is given, not looked for."""
        return True

    def world_size(self) -> int:
        """All processes."""
        return launch.world_size()

    def set_world_size(self, size: int) -> None:
        """The launcher has said it."""

    def global_rank(self) -> int:
        """Of this process."""
        return launch.rank()

    def set_global_rank(self, rank: int) -> None:
        """The launcher has said it."""

    def local_rank(self) -> int:
        """Among the processes of this machine."""
        return launch.local_rank()

    def node_rank(self) -> int:
        """Of this machine."""
        return launch.rank() // self._num_per_node
