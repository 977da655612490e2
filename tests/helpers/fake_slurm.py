"""Stand-ins for Slurm's commands on one machine.

Flows in: a folder. Flows out: its ``bin`` for PATH, and the environment of a job.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

SRUN = """
import os, signal, subprocess, sys, time

words, output, folder, at_once, patience = sys.argv[1:], None, None, False, None
count, per_node = (int(os.environ[f"SLURM_{name}"]) for name in ("NTASKS", "NTASKS_PER_NODE"))
while words[0].startswith("-"):
    word = words.pop(0)
    name, _, value = word.partition("=")
    if name in ("--output", "--chdir", "-w") and not value:
        value = words.pop(0)
    if name == "--ntasks":
        count = int(value)
    output = value if name == "--output" else output
    folder = value if name == "--chdir" else folder
    at_once = value != "0" if name == "--kill-on-bad-exit" else at_once
    patience = float(value) if name == "--wait" else patience
stream = open(output, "ab") if output else None
tasks = [
    subprocess.Popen(
        words, cwd=folder, stdout=stream, stderr=stream,
        env={
            **os.environ,
            "SLURM_PROCID": str(n),
            "SLURM_LOCALID": str(n % per_node),
            "SLURM_NODEID": str(n // per_node),
        },
    )
    for n in range(count)
]
def kill(*_):
    [task.kill() for task in tasks]
# As the real one: SIGUSR1 is passed on; SIGTERM means "forcing job termination".
signal.signal(signal.SIGUSR1, lambda n, _: [task.send_signal(n) for task in tasks])
signal.signal(signal.SIGTERM, kill)
first_end = None
while None in [task.poll() for task in tasks]:
    if any(task.returncode is not None for task in tasks):
        first_end = first_end or time.monotonic()
        if at_once and any(task.returncode for task in tasks):
            kill()
        if patience is not None and time.monotonic() - first_end > patience:
            kill()
    time.sleep(0.05)
sys.exit(max(abs(task.returncode) for task in tasks))
"""
SCONTROL = """
import os, sys
if sys.argv[1] == "show":
    print("127.0.0.1")
else:
    open(os.environ["FAKE_SLURM_LOG"], "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


class FakeSlurm:
    """Slurm's commands in a folder, and the job that they take part in.

    Args:
        folder: to write them to.
        num_tasks: of the job.
        num_nodes: that they are on; here they are all this machine.
    """

    def __init__(self, folder: Path, num_tasks: int, num_nodes: int = 1) -> None:
        self._bin, self._log = folder / "bin", folder / "scontrol.txt"
        self._job = {
            "JOB_ID": "4711",
            "JOB_NAME": "cosmos-train",
            "JOB_NODELIST": "node",
            "NNODES": str(num_nodes),
            "NTASKS": str(num_tasks),
            "NTASKS_PER_NODE": str(num_tasks // num_nodes),
        }
        self._bin.mkdir(parents=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            path = self._bin / name
            path.write_text(f"#!{sys.executable}\n{text}")
            path.chmod(0o755)

    @property
    def asked(self) -> list[str]:
        """What scontrol was told to do."""
        return self._log.read_text().splitlines() if self._log.exists() else []

    def environment(self) -> dict[str, str]:
        """Of the batch script, as sbatch would set it."""
        path = f"{self._bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {
            **os.environ,
            **{f"SLURM_{name}": value for name, value in self._job.items()},
            "PATH": path,
            "PYTHON": sys.executable,
            "FAKE_SLURM_LOG": str(self._log),
            "OMP_NUM_THREADS": "1",
        }


def directives(script: str) -> dict[str, str]:
    """The options in an sbatch script's head."""
    return {
        name: value.strip("'")
        for name, value in re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.M)
    }
