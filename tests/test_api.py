"""``import cosmos_posttrain``: instant, and the names that DESIGN promises."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from helpers.distributed_run import run_script

import cosmos_posttrain


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import sys, cosmos_posttrain\n"
        "heavy = {'torch', 'numpy', 'megatron', 'av', 'omegaconf'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    finished = run_script(["-c", program])
    assert finished.returncode == 0, finished.stderr


def test_public_names_are_there() -> None:
    assert set(cosmos_posttrain.__all__) <= set(dir(cosmos_posttrain))
    for name in cosmos_posttrain.__all__:
        assert getattr(cosmos_posttrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = cosmos_posttrain.nothing


def test_the_version_is_the_projects() -> None:
    pyproject = Path(__file__).resolve().parents[1] / "pyproject.toml"
    project = tomllib.loads(pyproject.read_text())["project"]
    assert cosmos_posttrain.__version__ == project["version"]
