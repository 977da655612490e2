"""Settings that every test runs under: one thread, no network, no launcher, no W&B.

They are environment variables, set before torch is imported, so that the processes which tests
start inherit them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS_DIR = Path(__file__).resolve().parent
REPOSITORY_DIR = TESTS_DIR.parent

# The package of helpers beside this file is imported from every subfolder.
sys.path.insert(0, str(TESTS_DIR))

# Rounding differs between thread counts, and parallel workers must not oversubscribe the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

for name in (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "WANDB_API_KEY",
    "WANDB_MODE",
):
    os.environ.pop(name, None)
