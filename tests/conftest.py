"""Settings that every test runs under: one thread, no network, no launcher, no W&B.

They are environment variables, set before torch is imported, so that the processes which tests
start inherit them.
"""

from __future__ import annotations

import functools
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

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


def pytest_configure(config: pytest.Config) -> None:
    """Everything runs on the CPU, also beside a GPU, unless tests marked ``gpu`` are asked for."""
    if not _selects_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _selects_gpu(config: pytest.Config) -> bool:
    expression = config.getoption("markexpr")
    return "gpu" in expression and "not gpu" not in expression


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what this machine cannot run, with the reason."""
    if item.get_closest_marker("gpu"):
        import torch

        if not _selects_gpu(item.config):
            pytest.skip("the GPU's tests are run by themselves: python -m pytest -m gpu")
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
    if item.get_closest_marker("network") and not _hub_answers():
        pytest.skip("the Hugging Face hub cannot be reached")


@functools.cache
def _hub_answers() -> bool:
    from huggingface_hub import constants

    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        return True  # an answer, if no page
    except OSError:
        return False
    return True
