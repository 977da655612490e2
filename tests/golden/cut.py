"""Makes these small golden cases from the full ones: ``python tests/golden/cut.py REFERENCE_DIR``.

Flows in: the reference data's ``golden/`` folder. Flows out: the same cases, smaller, beside this
file. Every number of an input, a weight and a result is the reference implementation's own:

- ``ar/*``: one of two sequences, and of the vocabulary the tokens that occur in it (rows of the
  embedding and of the output layer do not depend on each other).
- ``tokenizer/dv4x8x8``: the first five frames (the network is causal in time), and the weights
  without the tables that follow from the config.
- ``tokenizer/dv8x8x8`` and ``dv8x16x16`` would be too large: they hold what this package's network
  gives for weights and a video that are computed (``doctor.tokenizer_case``), and are written only
  where the same code gives what the reference gave.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosmos_posttrain import doctor
from cosmos_posttrain.tokenizer.native import load_native

HERE = Path(__file__).parent
AR_CASES = ("base_4b_like", "video2world_5b_like", "video2world_13b_like")
DIRECT, COMPUTED = "dv4x8x8", ("dv8x8x8", "dv8x16x16")
NUM_FRAMES, NUM_LATENTS = 5, 2
TOLERANCE = 1e-4


def cut_ar(source: Path, target: Path) -> None:
    """One sequence, and the part of the vocabulary that it needs."""
    config = json.loads((source / "config.json").read_text())
    io = load_file(source / "io.safetensors")
    weights = torch.load(source / "model.pt", weights_only=True)
    old_size, special = config["vocab_size"], config["vocab_size_in"] - config["vocab_size"]
    used = torch.cat([io["tokens"][0], io["greedy_tokens"]]).unique()
    used = used[used < old_size].long()
    rows = torch.cat([used, old_size + torch.arange(special)])
    renumbered = torch.full((old_size + special,), -1, dtype=torch.int32)
    renumbered[rows] = torch.arange(len(rows), dtype=torch.int32)
    weights["model.tok_embeddings.weight"] = weights["model.tok_embeddings.weight"][rows].clone()
    weights["model.output.weight"] = weights["model.output.weight"][used].clone()
    cut = {
        "tokens": renumbered[io["tokens"][:1].long()],
        "greedy_tokens": renumbered[io["greedy_tokens"].long()],
        "logits": io["logits"][:1, :, used].contiguous(),
    }
    if "context" in io:
        cut["context"] = io["context"][:1].clone()
    config |= {"vocab_size": len(used), "vocab_size_in": len(rows)}
    target.mkdir(parents=True)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(cut, target / "io.safetensors")
    torch.save(weights, target / "model.pt")


def cut_tokenizer(source: Path, target: Path) -> None:
    """The first frames of the video, and the weights that are no tables."""
    io = load_file(source / "io.safetensors")
    frames = {name: io[name][:, :, :NUM_FRAMES] for name in ("video", "reconstruction")}
    latents = {name: io[name][:, :, :NUM_LATENTS] for name in ("codes", "pre_quant")}
    cut = {**frames, **latents, "indices": io["indices"][:, :NUM_LATENTS]}
    weights = load_file(source / "model.safetensors")
    weights = {n: t for n, t in weights.items() if n.endswith((".weight", ".bias"))}
    target.mkdir(parents=True)
    shutil.copyfile(source / "config.json", target / "config.json")
    save_file(
        {name: tensor.contiguous() for name, tensor in cut.items()}, target / "io.safetensors"
    )
    save_file(weights, target / "model.safetensors")


def parity(source: Path) -> float:
    """The largest difference of a reconstruction from the reference's; the codes must be equal."""
    io = load_file(source / "io.safetensors")
    network = load_native(source, torch.device("cpu"), None).network
    with torch.no_grad():
        assert torch.equal(network.encode(io["video"]), io["indices"]), source
        difference: Tensor = (network.decode(io["indices"]) - io["reconstruction"]).abs().max()
    return float(difference)


def compute_tokenizer(source: Path, target: Path) -> None:
    """What this package's network gives, which is right where it agrees with the reference."""
    assert parity(source) <= TOLERANCE, source
    target.mkdir(parents=True)
    shutil.copyfile(source / "config.json", target / "config.json")
    network, video = doctor.tokenizer_case(target)
    with torch.no_grad():
        indices = network.encode(video)
        reconstruction = network.decode(indices)[..., ::2, ::2].contiguous()
    save_file({"indices": indices, "reconstruction": reconstruction}, target / "io.safetensors")


def main() -> None:
    """Replaces all cases."""
    golden = Path(sys.argv[1]) / "golden"
    for folder in ("ar", "tokenizer"):
        shutil.rmtree(HERE / folder, ignore_errors=True)
    for name in AR_CASES:
        cut_ar(golden / "ar" / name, HERE / "ar" / name)
    cut_tokenizer(golden / "tokenizer" / DIRECT, HERE / "tokenizer" / DIRECT)
    assert parity(HERE / "tokenizer" / DIRECT) <= TOLERANCE
    for name in COMPUTED:
        compute_tokenizer(golden / "tokenizer" / name, HERE / "tokenizer" / name)


if __name__ == "__main__":
    main()
