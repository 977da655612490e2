"""The autoregressive golden cases: weights, inputs, and what the reference made of them.

Cases go by name: ``base_4b_like`` is the shipped one and, where the reference data is present,
``full-base_4b_like`` the one that it was cut from.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from cosmos_posttrain import doctor
from cosmos_posttrain.inference.engine import generate
from cosmos_posttrain.models.ar_model import ARModel
from helpers.reference import golden_folders

_FOLDERS = {"base_12b_like": doctor.AR_CASE} | golden_folders("ar")
CASES = tuple(_FOLDERS)

# The same float32 arithmetic in another order of sums: 2e-6 was measured, logits reach about 3.
LOGIT_TOLERANCE = 1e-5


def cases_of(*names: str) -> tuple[str, ...]:
    """These cases, shipped and full."""
    return tuple(case for case in CASES if case.removeprefix("full-") in names)


def case_dir(name: str) -> Path:
    return _FOLDERS[name]


def case_io(name: str) -> dict[str, torch.Tensor]:
    return load_file(case_dir(name) / "io.safetensors")


def weights(name: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(case_dir(name) / "model.pt", weights_only=True)
    return state


def max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def golden_logits(model: ARModel, name: str) -> torch.Tensor:
    """The model's logits of the case's tokens, and text if it has one."""
    io = case_io(name)
    return model.logits(io["tokens"], io.get("context"))


def logit_difference(model: ARModel, name: str) -> float:
    """How far the model's logits are from the reference implementation's."""
    return max_difference(golden_logits(model, name), case_io(name)["logits"])


def greedy_tokens(model: ARModel, name: str) -> list[int]:
    """As many tokens as the golden case has, through the KV cache."""
    io, config = case_io(name), json.loads((case_dir(name) / "config.json").read_text())
    prompt = io["tokens"][:1, : config["num_condition_tokens"]].long()
    context = io["context"][:1] if "context" in io else None
    tokens = generate(model, prompt, len(io["greedy_tokens"]), temperature=0, context=context)
    return list(map(int, tokens[0]))
