"""The zarr script, on arrays laid out as Megatron wrote them (zarr 2, uncompressed, in pieces)."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from helpers.distributed_run import REPOSITORY_DIR, run_script

from cosmos_posttrain.checkpoint import mapping, nemo_context
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.checkpoint.torch_dist_weights import disk_key
from cosmos_posttrain.errors import CheckpointError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.config import ModelConfig

CONFIG = ModelConfig(3, 32, 4, 2, 12, 48, 128, LatentShape(2, 2, 3))
SCRIPT = REPOSITORY_DIR / "scripts" / "convert_zarr_checkpoint.py"


def _write_array(folder: Path, tensor: torch.Tensor, chunks: tuple[int, ...], dtype: str) -> None:
    """Pieces at the edges are full-sized, as zarr writes them."""
    folder.mkdir()
    about = {"shape": list(tensor.shape), "chunks": list(chunks), "dtype": dtype}
    about |= {"zarr_format": 2, "order": "C", "compressor": None, "filters": None}
    (folder / ".zarray").write_text(json.dumps({**about, "fill_value": None}))
    counts = [-(-n // c) for n, c in zip(tensor.shape, chunks, strict=True)]
    for place in itertools.product(*map(range, counts)):
        piece = torch.zeros(chunks, dtype=tensor.dtype)
        region = [slice(i * c, (i + 1) * c) for i, c in zip(place, chunks, strict=True)]
        part = tensor[tuple(region)]
        piece[tuple(slice(0, n) for n in part.shape)] = part
        data = piece.reshape(-1).view(torch.uint8).numpy().tobytes()
        (folder / ".".join(map(str, place))).write_bytes(data)


@pytest.fixture
def nemo(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A NeMo folder: layers stacked, every tensor in two tensor-parallel pieces of odd sizes."""
    folder = tmp_path / "nemo"
    (folder / "weights").mkdir(parents=True)
    nemo_context.write(folder, CONFIG)
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in mapping.reference_shapes(CONFIG).items()
    }
    stacked: dict[str, list[torch.Tensor]] = {}
    for name in mapping.megatron_names(CONFIG):
        key, layer = disk_key(name)
        tensor = mapping.to_megatron(name, state.__getitem__, CONFIG)
        stacked.setdefault(key, []).append(tensor if layer is None else tensor[None])
    for key, parts in stacked.items():
        whole = torch.cat(parts)
        chunks = [-(-n // 2) for n in whole.shape]
        if ".layers." in key:
            chunks[0] = 1
        dtype = "<V2" if "norm" in key else "bfloat16"
        _write_array(folder / "weights" / key, whole, tuple(chunks), dtype)
    state_of_optimizer = torch.zeros(4)
    name = "optimizer.state.exp_avg.module.output_layer.weight"
    _write_array(folder / "weights" / name, state_of_optimizer, (4,), "<f4")
    return folder, state


def test_weights_and_context_arrive(
    nemo: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, state = nemo
    with pytest.raises(CheckpointError, match=r"zarr format; convert it with scripts/convert_zarr"):
        open_source(folder)
    target = tmp_path / "converted"
    environment = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY_DIR)])}
    command = [SCRIPT, "--source", folder, "--target", target]
    finished = run_script(command, env=environment)
    assert finished.returncode == 0, finished.stderr
    source = open_source(target)
    assert (source.format.name, source.config) == ("nemo", CONFIG)
    read = dict(source.open_weights().reference())
    assert list(read) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read.items())
    finished = run_script(command, env=environment)
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("damage", ["piece", "compressor"])
def test_damage(nemo: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, damage: str) -> None:
    array = nemo[0] / "weights" / "module.decoder.layers.mlp.linear_fc1.weight"
    if damage == "piece":
        (array / "2.1.0").unlink()
    else:
        about = json.loads((array / ".zarray").read_text())
        (array / ".zarray").write_text(json.dumps({**about, "compressor": {"id": "blosc"}}))
    command = [SCRIPT, "--source", nemo[0], "--target", tmp_path / "new" / "converted"]
    finished = run_script(command, env={"PYTHONPATH": str(REPOSITORY_DIR)})
    assert (finished.returncode, finished.stderr.count("\n")) == (2, 1)
    assert ("missing or truncated" if damage == "piece" else "compressed") in finished.stderr
    assert not list((tmp_path / "new").iterdir())
