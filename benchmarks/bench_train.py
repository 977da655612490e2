"""Training speed: a run of this package against plain loops around a Hugging Face Llama.

The same shape (grouped queries, vocabulary, tied to nothing), batch, AdamW, clipping and schedule;
float32, on the CPU. One process takes a step of each in turn, in an order that turns with the
rounds; a ratio is the median of the rounds' ratios, which a machine that slows down for a while
leaves alone. Ours is ``Trainer.train_step``, as train_general.py runs it: its model has two norms a
layer more (queries and keys), and a 3D RoPE.

    python benchmarks/bench_train.py                              # ~30M and ~100M, one thread
    python benchmarks/bench_train.py --size 30M --threads 2 --compile
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, not installed

from cosmos_posttrain import launch
from cosmos_posttrain.config import merge
from cosmos_posttrain.data.indexed import ShardWriter
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.models.compiling import compile_models
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.presets import PRESETS
from cosmos_posttrain.training.config import TrainConfig
from cosmos_posttrain.training.trainer import Trainer

GRID = LatentShape(5, 12, 20)  # 1,200 tokens
SIZES = {
    "30M": {
        "num_layers": 8,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_query_groups": 2,
        "kv_channels": 64,
        "ffn_hidden_size": 1792,
        "vocab_size": 4096,
    },
    "100M": {
        "num_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_query_groups": 4,
        "kv_channels": 64,
        "ffn_hidden_size": 2560,
        "vocab_size": 8192,
    },
}
LR, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
MAX_STEPS = 10_000
Step = Callable[[], float]


def data_settings(folder: Path, model: ModelConfig, num_clips: int = 64) -> dict[str, Any]:
    """Settings of a run on random tokens for a model, which are written into a folder."""
    tokens = folder / "tokens"
    generator = np.random.default_rng(0)
    with ShardWriter(tokens.with_suffix(".bin"), tokens.with_suffix(".idx"), "uint16") as shard:
        for _ in range(num_clips):
            shard.add(generator.integers(0, model.vocab_size, model.seq_length, dtype=np.uint16))
        shard.finish()
    return {
        "data.path": str(tokens),
        "data.split_string": "1,0,0",
        "data.latent_shape": ",".join(map(str, model.latent_shape)),
        "data.vocab_size": model.vocab_size,
    }


def our_step(size: str, batch_size: int, folder: Path, compiled: bool = False) -> Step:
    """A run on random tokens, set up as train_general.py sets it up."""
    folder.mkdir()
    model = ModelConfig(latent_shape=GRID, params_dtype="float32", **SIZES[size])
    PRESETS[size] = model
    settings = {
        **data_settings(folder, model),
        "model.path": f"random:{size}",
        "model.dtype": "float32",
        "log_dir": str(folder / "run"),
        "parallel.tensor_model_parallel_size": 1,
        "global_batch_size": batch_size,
        "micro_batch_size": batch_size,
        "max_steps": MAX_STEPS,
        "optimizer.lr": LR,
        "optimizer.adam_beta1": BETAS[0],
        "optimizer.adam_beta2": BETAS[1],
        "optimizer.adam_eps": EPS,
        "optimizer.weight_decay": DECAY,
        "optimizer.clip_grad": CLIP,
        "model.compile": compiled,
    }
    trainer = Trainer(merge(TrainConfig, None, list(settings.items())))
    batches = trainer.batches()

    def step() -> float:
        compile_models(compiled)  # the other run in this process may not want it
        return trainer.train_step(next(batches))["reduced_train_loss"]

    return step


def hugging_face_step(size: str, batch_size: int, fused: bool, compiled: bool) -> Step:
    """The loop that a researcher would write."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SIZES[size]
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["ffn_hidden_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_query_groups"],
        head_dim=shape["kv_channels"],
        max_position_embeddings=GRID.num_tokens,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=fused or None
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 500))
    forward = torch.compile(model) if compiled else model
    data = torch.randint(shape["vocab_size"], (64, batch_size, GRID.num_tokens))
    number = 0

    def step() -> float:
        nonlocal number
        tokens = data[number % len(data)]
        number += 1
        optimizer.zero_grad()
        loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        return loss.item()

    return step


def run_size(size: str, args: argparse.Namespace) -> dict:
    """Times all candidates at one size."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {"ours": our_step(size, args.batch_size, Path(folder) / "ours")}
        if args.compile:
            compiled = our_step(size, args.batch_size, Path(folder) / "compiled", compiled=True)
            steps["ours, --compile"] = compiled
        variants = {"Hugging Face": (False, False), "Hugging Face, fused AdamW": (True, False)}
        if args.compile:
            variants["Hugging Face, fused AdamW, compiled"] = (True, True)
        for name, variant in variants.items():
            steps[name] = hugging_face_step(size, args.batch_size, *variant)
        names = list(steps)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        for number in range(args.warmup + args.steps):
            first = number % len(steps)
            for name in [*names[first:], *names[:first]]:
                started = time.perf_counter(), time.process_time()
                loss = steps[name]()
                ended = time.perf_counter(), time.process_time()
                assert np.isfinite(loss), f"{name}: the loss is not finite"
                if number >= args.warmup:
                    seconds[name].append((ended[0] - started[0], ended[1] - started[1]))
    tokens = args.batch_size * GRID.num_tokens
    result: dict = {"size": size, "threads": args.threads, "steps": args.steps, "loops": {}}
    for name, pairs in seconds.items():
        wall, cpu = (statistics.median(column) for column in zip(*pairs, strict=True))
        result["loops"][name] = {
            "tokens_per_second": tokens / wall,
            "wall_seconds": wall,
            "cpu_seconds": cpu,
        }
    result["is_faster_by"] = {
        own: {
            name: _ratios(theirs, seconds[own])
            for name, theirs in seconds.items()
            if not name.startswith("ours")
        }
        for own in seconds
        if own.startswith("ours")
    }
    return result


def _ratios(theirs: list[tuple[float, float]], ours: list[tuple[float, float]]) -> dict:
    """Medians over the rounds, and between which half of the rounds lie."""
    found = {}
    for column, kind in enumerate(("wall_seconds", "cpu_seconds")):
        ratios = [their[column] / own[column] for their, own in zip(theirs, ours, strict=True)]
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
        found[kind] = {"median": median, "quartiles": [low, high]}
    return found


def show(result: dict) -> None:
    """Prints one size as a table."""
    parameters = PRESETS[result["size"]].num_parameters
    print(
        f"{result['size']} ({parameters / 1e6:.1f}M parameters), {result['threads']} thread(s), "
        f"{GRID.num_tokens} tokens, medians of {result['steps']} steps"
    )
    for name, values in result["loops"].items():
        print(
            f"  {name:36s} {values['tokens_per_second']:7.0f} tokens/s, "
            f"{values['cpu_seconds']:.3f} CPU s"
        )
    for own, others in result["is_faster_by"].items():
        for name, ratio in others.items():
            cpu = ratio["cpu_seconds"]
            low, high = cpu["quartiles"]
            print(
                f"  {own} is {cpu['median']:.3f}x as fast as {name} by CPU time "
                f"(half of the rounds {low:.3f} to {high:.3f}), "
                f"{ratio['wall_seconds']['median']:.3f}x by the clock"
            )


def main() -> None:
    """Runs the sizes, prints them, and writes them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", action="append", choices=sorted(SIZES), help="default: all")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--compile", action="store_true", help="also time both sides with torch.compile"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    if launch.device().type != "cpu":
        raise ConfigError(
            "this compares loops on the CPU, but ours would run on this machine's GPU: give "
            "CUDA_VISIBLE_DEVICES= before the command, or run benchmarks/bench_gpu.py."
        )
    torch.set_num_threads(args.threads)
    results = []
    for size in args.size or sorted(SIZES, key=lambda name: int(name[:-1])):
        results.append(run_size(size, args))
        show(results[-1])
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    launch.run_cli(main)
