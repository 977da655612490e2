"""NeMo's trainer gives the direct engine's loss curve; in the environment of `make nemo-env`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers.distributed_run import REPOSITORY_DIR
from helpers.prepared import make_videos, prepare_small

# Not `nemo` alone, which this folder would be.
IS_MISSING = find_spec("nemo.lightning") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(IS_MISSING, reason="NeMo is missing; see make nemo-env"),
]

# NeMo's import warns in many places, and pytest makes warnings errors: processes of their own.
PROGRAM = """
import json, sys
from pathlib import Path
from cosmos_posttrain import launch
from helpers.run_case import losses, make_config, run
engine, tokens, folder, size = *map(str, sys.argv[1:4]), int(sys.argv[4])
config = make_config(Path(tokens), Path(folder), parallel__tensor_model_parallel_size=size)
if engine == "nemo":
    from cosmos_posttrain.nemo.engine import train
    found = train(config)
else:
    run(config)
    found = losses(Path(folder)) if launch.is_rank_zero() else []
if launch.is_rank_zero():
    Path(folder + ".json").write_text(json.dumps(found))
"""


def curve(engine: str, tokens: Path, folder: Path, size: int) -> list[float]:
    program = folder.with_name(f"run_{engine}.py")  # never nemo.py
    program.write_text(PROGRAM)
    words = [str(program), engine, str(tokens), str(folder), str(size)]
    if size > 1:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *words]
    path = f"{REPOSITORY_DIR}:{REPOSITORY_DIR / 'tests'}"
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", *words],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return json.loads(Path(f"{folder}.json").read_text())


@pytest.mark.parametrize("size", [1, 2])
def test_nemo_gives_the_direct_engines_curve(size: int, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    prepare_small(make_videos(tmp_path / "videos"), tmp_path / "tokens")
    direct, nemo = (
        curve(engine, tmp_path / "tokens", tmp_path / engine, size) for engine in ("direct", "nemo")
    )
    assert len(direct) == 20
    # The gradient is divided by the number of tokens after its sum here, before it there.
    assert nemo == pytest.approx(direct, rel=1e-4)
