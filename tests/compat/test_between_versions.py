"""One version of Megatron-Core beside the others: equal curves, and runs that go on under another.

``scripts/test_matrix.py`` runs this file in an environment a version, with ``COSMOS_MATRIX_DIR``
for what they leave to one another; without it everything here is skipped.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

import pytest
import torch
from helpers.distributed_run import run_distributed
from helpers.prepared import make_videos, prepare_small
from helpers.run_case import losses, make_config, run

from cosmos_posttrain.training.config import TrainConfig

NAMED = os.environ.get("COSMOS_MATRIX_DIR")
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(NAMED is None, reason="needs COSMOS_MATRIX_DIR; see scripts/test_matrix.py"),
]
HERE = (
    f"python{platform.python_version()}-core{importlib.metadata.version('megatron-core')}"
    f"-torch{torch.__version__}"
)
HALF_WAY = "*step=9"


def runs_dir() -> Path:
    return Path(NAMED or "") / "runs"


def config_of(log_dir: Path) -> TrainConfig:
    """20 steps at TP 2 on data that the first version has prepared, saved after 10 and 20."""
    tokens = Path(NAMED or "") / "tokens"
    config = make_config(tokens, log_dir, max_steps=20, save_every_n_steps=10)
    config.model.path = str(Path(NAMED or "") / "start")
    config.parallel.tensor_model_parallel_size = 2
    return config


def others() -> list[str]:
    return sorted(path.name for path in runs_dir().iterdir() if path.name != HERE)


def largest_difference(first: list[float], second: list[float]) -> float:
    assert len(first) == len(second) == 20
    return max(abs(a - b) / a for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module", autouse=True)
def common_start() -> None:
    """Tokens and weights that all versions begin with; the first one makes them."""
    folder = Path(NAMED or "")
    if (folder / "start" / "default" / "checkpoints").is_dir():
        return
    (folder / "videos").mkdir()
    prepare_small(make_videos(folder / "videos"), folder / "tokens")
    run(make_config(folder / "tokens", folder / "start", max_steps=1))
    runs_dir().mkdir()


def test_it_writes_a_run() -> None:
    run_distributed(run, 2, config_of(runs_dir() / HERE))
    assert len(list((runs_dir() / HERE / "default" / "checkpoints").glob("*step=*"))) == 2


def test_others_have_the_same_curve() -> None:
    assert others()
    own = losses(runs_dir() / HERE)
    found = {name: largest_difference(own, losses(runs_dir() / name)) for name in others()}
    assert max(found.values()) <= 1e-5, found


def test_a_run_of_others_goes_on(tmp_path: Path) -> None:
    """From the other version's checkpoint of step 10, weights and optimizer."""
    found = {}
    for name in others():
        shutil.copytree(runs_dir() / name, tmp_path / name)
        default = tmp_path / name / "default"
        for checkpoint in (default / "checkpoints").iterdir():
            if not checkpoint.match(HALF_WAY):
                shutil.rmtree(checkpoint)
        metrics = default / "metrics.jsonl"
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:10]))
        run_distributed(run, 2, config_of(tmp_path / name))
        found[name] = largest_difference(losses(runs_dir() / HERE), losses(tmp_path / name))
    assert max(found.values()) <= 1e-5, found
