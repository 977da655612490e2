"""Conversion needs memory for one layer's tensors, whatever the size of the model.

COSMOS_STREAMING_GB sets the size of the slow case's ``model.pt``; it needs three times that on the
temporary disk.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from helpers.distributed_run import run_script

from cosmos_posttrain.checkpoint import mapping
from cosmos_posttrain.checkpoint.pt_file import PtWriter
from cosmos_posttrain.files import write_json
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.reference_config import to_reference

# Converts, and samples the process's anonymous memory (not pages of files) every millisecond.
_MEASURED = """
import json, sys, threading, time

from cosmos_posttrain.checkpoint import pt_file, safetensors_file, torch_dist_weights
from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
from cosmos_posttrain.checkpoint.convert import convert

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def measure(settings):
    def sample():
        while not done.is_set():
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.001)

    done, peak = threading.Event(), [anonymous_bytes()]
    start, thread = peak[0], threading.Thread(target=sample)
    thread.start()
    try:
        convert(CheckpointConversionConfig(**settings))
    finally:
        done.set()
        thread.join()
    return {"start": start, "peak": peak[0]}

if __name__ == "__main__":
    todo, output = sys.argv[1:]
    json.dump([measure(settings) for settings in json.load(open(todo))], open(output, "w"))
"""

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="needs /proc (Linux)"
)
# Layers of 25 MB (bfloat16); the vocabulary's two tensors are 8 MB each.
LAYER = ModelConfig(1, 1024, 8, 2, 128, 3072, 4096, LatentShape(2, 2, 3))


def _synthetic(folder: Path, config: ModelConfig) -> Path:
    """A model.pt of bfloat16 noise, written a tensor at a time."""
    folder.mkdir()
    shapes = mapping.reference_shapes(config)
    writer = PtWriter(folder / "model.pt", {n: (s, torch.bfloat16) for n, s in shapes.items()})
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add(name, torch.randn(shape, generator=generator).bfloat16())
    writer.finish()
    write_json(folder / "config.json", to_reference(config))
    return folder


def _convert(folder: Path, todo: list[tuple[str, str, str]], verify: bool) -> list[dict[str, int]]:
    """Runs conversions (source, target, form) in one process of their own."""
    settings = [
        {
            "source": str(folder / source),
            "target": str(folder / target),
            "target_format": form,
            "verify": verify,
        }
        for source, target, form in todo
    ]
    program, asked, output = (folder / name for name in ("measured.py", "todo.json", "output.json"))
    program.write_text(_MEASURED)
    asked.write_text(json.dumps(settings))
    repository = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([repository, *filter(None, [os.environ.get("PYTHONPATH")])])
    finished = run_script([program, asked, output], env={"PYTHONPATH": path}, timeout_seconds=1800)
    assert finished.returncode == 0, finished.stderr
    measured: list[dict[str, int]] = json.loads(output.read_text())
    return measured


def _same_bytes(first: Path, second: Path) -> bool:
    before = torch.load(first / "model.pt", weights_only=True, mmap=True)
    after = torch.load(second / "model.pt", weights_only=True, mmap=True)
    return list(before) == list(after) and all(torch.equal(t, after[k]) for k, t in before.items())


@needs_proc
@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    todo, sizes = [], {}
    for layers in (2, 8):  # 67 MB and 218 MB
        config = dataclasses.replace(LAYER, num_layers=layers)
        source = _synthetic(tmp_path / f"{layers}", config)
        sizes[layers] = (source / "model.pt").stat().st_size
        todo += [(f"{layers}", f"{layers}-megatron", "megatron")]
        todo += [(f"{layers}", f"{layers}-safetensors", "safetensors")]
        todo += [(f"{layers}-megatron", f"{layers}-pt", "pt")]
    measured = _convert(tmp_path, todo, verify=False)
    needed = [entry["peak"] - entry["start"] for entry in measured]
    for small, large in zip(needed[:3], needed[3:], strict=True):
        # Within what the allocator keeps; the models differ by 150 MB.
        assert large - small < 20e6, needed
        assert large < sizes[8] / 3, (needed, sizes)


@pytest.mark.slow
@needs_proc
def test_a_large_model_there_and_back(tmp_path: Path) -> None:
    """4 GB under 1.5 GB of anonymous memory, and other sizes in proportion; bit-equal."""
    gigabytes = float(os.environ.get("COSMOS_STREAMING_GB", "1"))
    # At 4 GB layers of 436 MB, as the 4B model's, so that the largest tensors are the real ones.
    big = ModelConfig(1, 4096, 32, 8, 128, 14336, 16000, LatentShape(2, 2, 3))
    config = big if gigabytes >= 4 else LAYER
    two = dataclasses.replace(config, num_layers=2)
    per_layer = 2 * (two.num_parameters - config.num_parameters)
    layers = round((gigabytes * 1e9 - 2 * config.num_parameters) / per_layer) + 1
    source = _synthetic(tmp_path / "pt", dataclasses.replace(config, num_layers=layers))
    size = (source / "model.pt").stat().st_size
    assert abs(size - gigabytes * 1e9) < 0.25e9
    todo = [("pt", "megatron", "megatron"), ("megatron", "back", "pt")]
    measured = _convert(tmp_path, todo, verify=True)
    print(f"{size / 1e9:.2f} GB, {layers} layers: {measured}", file=sys.stderr)
    assert _same_bytes(source, tmp_path / "back")
    # What the libraries take by themselves (about 0.4 GB) does not shrink with the model.
    allowed = 1.5e9 if gigabytes >= 4 else 0.5e9 + 0.25e9 * gigabytes
    assert max(entry["peak"] for entry in measured) < allowed, measured
