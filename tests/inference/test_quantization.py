"""Weights of 8 bits: what they change, what goes with them, and the message without torchao."""

from __future__ import annotations

import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import infer_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosmos_posttrain import generate, load_model
from cosmos_posttrain.checkpoint.load import load_source
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.inference.decode_plan import DecodePlan
from cosmos_posttrain.inference.decode_state import DecodeState
from cosmos_posttrain.inference.quantization import quantize
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.inference.session import Session
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.plan.inference import weight_bytes

GRID = LatentShape(3, 3, 4)


def session(**changes: str) -> Session:
    return Session(infer_case.random_config(Path("unused"), Path("unused"), **changes))


def test_without_torchao_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"needs torchao, which is not installed; pip install"):
        session(quantization="int8")
    with pytest.raises(ConfigError, match="does not go with --decoding modules"):
        session(quantization="int8", decoding="modules")
    with pytest.raises(ConfigError, match="int4"):
        session(quantization="int4")


def scores(model: ARModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return DecodeState(DecodePlan(model), *tokens.shape).feed(tokens, tokens.shape[1])


def test_scores_are_close_and_matrices_small() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed (extra int8)")
    model = load_model("random:tiny", latent_shape=GRID)
    tokens = torch.randint(0, 1000, (2, 30), generator=torch.Generator().manual_seed(0))
    exact = scores(model, tokens)
    quantize(model)
    rounded = scores(model, tokens)
    # 8 bits of the largest of a row: about 0.4% of each product.
    error = float((rounded - exact).norm() / exact.norm())
    assert 0 < error < 0.03
    matrix = model.module.decoder.layers[0].mlp.linear_fc1.weight
    assert matrix.qdata.dtype == torch.int8 and matrix.qdata.shape == (1024, 192)
    settings = {"temperature": 0.0, "decoding": "sequential"}
    one_by_one = generate(model, tokens[:, :12], 24, **settings)
    windows = generate(model, tokens[:, :12], 24, **(settings | {"decoding": "jacobi"}))
    assert torch.equal(windows, one_by_one)


class Held(TorchDispatchMode):
    """Bytes on the ``meta`` device, which stands for a GPU here: held now, and at the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            # Not torchao's, which hold others and nothing themselves.
            if type(tensor) is torch.Tensor and tensor.device.type == "meta":
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage.nbytes())
        return found

    def _gone(self, num_bytes: int) -> None:
        self.now -= num_bytes


def test_a_gpu_never_holds_the_whole_model() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed (extra int8)")
    settings = {"latent_shape": GRID, "dtype": "bfloat16"}
    source = open_source("random:tiny").at_grid(GRID)
    model = load_source(source, "bfloat16", device="cpu")
    quantize(model, torch.device("cpu"))
    other = load_model("random:tiny", **settings)
    quantize(other)
    for name, own in other.module.state_dict().items():
        if isinstance(own, torch.Tensor):
            found = model.module.state_dict()[name]
            parts = ("qdata", "scale") if hasattr(own, "qdata") else ("data",)
            assert all(torch.equal(getattr(found, p), getattr(own, p)) for p in parts), name

    model = load_model("random:tiny", **settings)
    matrices = [p for p in model.module.decoder.layers.parameters() if p.ndim == 2]
    largest = max(matrix.numel() for matrix in matrices)
    rounded = weight_bytes(model.config, "int8")
    with Held() as held:
        quantize(model, torch.device("meta"))
    assert model.device.type == "meta"
    assert rounded <= held.now <= 1.05 * rounded
    # A matrix, and a copy of it in float32.
    assert rounded < held.peak <= 1.05 * rounded + (2 + 4) * largest
    assert held.peak < weight_bytes(model.config, "bf16")


def test_a_session_with_8_bits() -> None:
    pytest.importorskip("torchao", reason="torchao is not installed (extra int8)")
    tokens = torch.randint(0, 1000, (1, *infer_case.LATENT_SHAPE[1:]))
    opened = session(quantization="int8", dtype="bfloat16", offload_ar_model=True)
    clip = opened.generate(Request(tokens=tokens, top_p=0.9))
    assert clip.settings["quantization"] == "int8"
    assert torch.equal(opened.generate(Request(tokens=tokens, top_p=0.9)).tokens, clip.tokens)
