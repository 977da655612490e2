"""NeMo imports, restores, saves and exports our models; in the environment of `make nemo-env`."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR

from cosmos_posttrain.checkpoint import mapping
from cosmos_posttrain.checkpoint.convert import verify
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.files import write_json
from cosmos_posttrain.models.reference_config import to_reference

IS_MISSING = find_spec("nemo.lightning") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(IS_MISSING, reason="NeMo is missing; see make nemo-env"),
]

# NeMo's import warns in many places, and pytest makes warnings errors: a process of its own.
PROGRAM = """
import sys
from pathlib import Path

import nemo.lightning as nl
import torch
from nemo.collections import llm
from nemo.lightning.io.connector import ModelConnector

from cosmos_posttrain.checkpoint.load import load_model
from cosmos_posttrain.distributed import groups
from cosmos_posttrain.nemo import CosmosModel
from cosmos_posttrain.nemo.device import nemo_device


def make_trainer():
    strategy = nl.MegatronStrategy(
        ddp="pytorch",
        setup_optimizers=False,
        ckpt_save_optimizer=False,
        always_save_context=True,
        ckpt_async_save=False,
        use_gloo_process_groups=False,
        process_group_backend="gloo",
        pipeline_dtype=torch.float32,
    )
    off = {"logger": False, "enable_progress_bar": False}
    return nl.Trainer(devices=1, accelerator="cpu", strategy=strategy, **off)


def parameters(module):
    while not hasattr(module, "model_config"):
        module = module.module
    return dict(module.named_parameters())


def bring_in(folder):
    source = f"pt://{folder / 'pt' / 'model.pt'}"
    model = CosmosModel.importer(source).init()
    llm.import_ckpt(model=model, source=source, output_path=folder / "imported")


def go_through(folder):
    connector = ModelConnector("unused")
    restored, trainer = connector.nemo_load(folder / "imported", make_trainer())
    assert type(restored) is CosmosModel
    expected, found = parameters(load_model(folder / "pt").module), parameters(restored)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    connector.nemo_save(folder / "saved", trainer)
    llm.export_ckpt(folder / "saved", "safetensors", folder / "exported")


def main():
    folders = [Path(word) for word in sys.argv[1:]]
    for folder in folders:  # before there are process groups
        bring_in(folder)
    groups.initialize(groups.Parallelism(), seed=1234)
    with nemo_device():
        for folder in folders:
            go_through(folder)


if __name__ == "__main__":  # Megatron's writer starts processes
    main()
"""


def make_model(folder: Path, size: str) -> Path:
    folder.mkdir(parents=True)
    config = open_source(f"random:{size}").config
    generator = torch.Generator().manual_seed(0)
    shapes = mapping.reference_shapes(config)
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(state, folder / "model.pt")
    write_json(folder / "config.json", to_reference(config))
    return folder


def test_there_and_back_through_nemos_own_functions(tmp_path: Path) -> None:
    """Bit-equal: imported, restored by NeMo, saved by NeMo, read here, exported by NeMo."""
    folders = [tmp_path / size for size in ("tiny", "tiny-video2world")]
    for folder in folders:
        make_model(folder / "pt", folder.name)
    program = tmp_path / "connect.py"
    program.write_text(PROGRAM)
    path = f"{REPOSITORY_DIR}:{REPOSITORY_DIR / 'tests'}"
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), *map(str, folders)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    for folder in folders:
        source, saved = open_source(folder / "pt"), open_source(folder / "saved")
        assert saved.format is not None and saved.format.name == "nemo"
        assert saved.config == source.config
        weights = source.open_weights()
        verify(weights, saved)
        verify(weights, open_source(folder / "exported"))
