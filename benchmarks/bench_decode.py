"""Decoding speed on one machine: ours against Hugging Face `generate` on the same shape, in turn.

Both have float32 weights of the same shape, one clip, greedy tokens after the same number of given
ones. Hugging Face runs a `LlamaForCausalLM`, with each cache that is named. Runs alternate, so that
a busy machine slows all of them; the ratio is of the medians. With `--clock cpu` the time in which
other programs had the core is not counted.

    python benchmarks/bench_decode.py --shape 30M --num_tokens 1280
    python benchmarks/bench_decode.py --shape 100M --num_tokens 1280 --peers dynamic,static,compiled
    python benchmarks/bench_decode.py --run RUN --data_path TOKENS --windows 4,8,16,32

With `--run`, a trained model continues held-out clips: one by one and by windows, greedy
and sampled, with the tokens that differ counted; Hugging Face has random weights of its shape. With
`--heads` only its Medusa heads are looked at: tokens a pass with drafts from them and without, and
of each head how many of the tokens that it foretold came.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from cosmos_posttrain import generate, load_model
from cosmos_posttrain.checkpoint.load import load_source
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.data.dataset import TokenDataset
from cosmos_posttrain.geometry import LatentShape
from cosmos_posttrain.inference.decode_plan import lay_out
from cosmos_posttrain.inference.decode_state import DecodeState
from cosmos_posttrain.inference.head_drafts import HeadCounts
from cosmos_posttrain.models.ar_model import ARModel
from cosmos_posttrain.models.builder import build_model
from cosmos_posttrain.models.config import ModelConfig
from cosmos_posttrain.models.presets import preset

# Layers, hidden size, heads, groups, MLP; a vocabulary of 4,000.
SHAPES = {"30M": (8, 512, 8, 2, 1536), "100M": (12, 768, 12, 4, 3072)}
SAMPLED = {"temperature": 1.0, "top_p": 0.8}
Job = Callable[[], torch.Tensor]


def shape_config(name: str, num_tokens: int) -> ModelConfig:
    """A model of a size, whose grid holds so many tokens."""
    layers, hidden, heads, groups, mlp = SHAPES[name]
    return dataclasses.replace(
        preset("tiny"),
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=hidden // heads,
        ffn_hidden_size=mlp,
        vocab_size=4000,
        latent_shape=LatentShape(-(-num_tokens // 256), 16, 16),
    )


def peer(config: ModelConfig):
    """Hugging Face's Llama of the same shape, with fresh weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        max_position_embeddings=config.latent_shape.num_tokens,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(llama).eval()


def peer_job(model, cache: str, prompt: torch.Tensor, num_tokens: int) -> Job:
    """Greedy generation; ``compiled`` is the static cache with the forward pass compiled."""
    settings = {} if cache == "dynamic" else {"cache_implementation": "static"}
    if cache == "compiled":
        model = _compiled(model)

    def job() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                pad_token_id=0,
                **settings,
            )[:, prompt.shape[1] :]

    return job


def _compiled(model):
    import copy

    other = copy.copy(model)
    other.forward = torch.compile(model.forward, dynamic=False)
    return other


def times_of(jobs: dict[str, Job], runs: int, clock: str) -> dict[str, list[float]]:
    """Seconds of each job, ``runs`` times in turn after one that is not counted."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for run in range(runs + 1):
        for name, job in jobs.items():
            started = now()
            job()
            if run:
                times[name].append(now() - started)
    return times


def show(times: dict[str, list[float]], num_tokens: int, against: str) -> None:
    """A line for each job."""
    base = statistics.median(times[against])
    for name, values in times.items():
        median = statistics.median(values)
        slow, fast = num_tokens / max(values), num_tokens / min(values)
        print(
            f"{name:34s} {num_tokens / median:8.1f} tokens/s ({slow:.1f}..{fast:.1f})"
            f"{base / median:7.2f}x {against}",
            flush=True,
        )


class Passes:
    """Counts forward passes of the decode plan while it is entered."""

    def __enter__(self) -> Passes:
        self.count, self._real = 0, DecodeState.feed
        real = self._real

        def counting(state, *args, **kwargs):
            self.count += 1
            return real(state, *args, **kwargs)

        DecodeState.feed = counting
        return self

    def __exit__(self, *_error: object) -> None:
        DecodeState.feed = self._real


def fresh(config: ModelConfig) -> ARModel:
    """A model of a shape with random weights, laid out as a session lays it out."""
    load_model("random:tiny")  # process groups
    model = ARModel(build_model(config))
    lay_out(model)
    return model


def compare_shape(args: argparse.Namespace) -> None:
    """Ours one by one against the peers, and batches against one clip."""
    config = shape_config(args.shape, args.prompt_tokens + args.num_tokens)
    model, other = fresh(config), peer(config)
    count = sum(parameter.numel() for parameter in model.module.parameters())
    theirs = sum(parameter.numel() for parameter in other.parameters())
    print(f"{args.shape}: {count / 1e6:.1f}M parameters, Hugging Face {theirs / 1e6:.1f}M")
    generator = torch.Generator().manual_seed(1)
    size = (max(1, args.batch), args.prompt_tokens)
    prompts = torch.randint(config.vocab_size, size, generator=generator)
    jobs = {
        f"Hugging Face, {cache}": peer_job(other, cache, prompts[:1], args.num_tokens)
        for cache in args.peers.split(",")
    }
    for way in ("modules", "sequential"):
        if way != "modules" or args.modules:
            jobs[f"ours, {way}"] = _ours(model, prompts[:1], args.num_tokens, way)
    times = times_of(jobs, args.runs, args.clock)
    best = min(
        (name for name in jobs if name.startswith("Hugging")),
        key=lambda name: statistics.median(times[name]),
    )
    show(times, args.num_tokens, best)
    if args.batch > 1:
        few = min(args.num_tokens, 256)
        batches = {
            "1 clip": _ours(model, prompts[:1], few, "sequential"),
            f"{args.batch} clips": _ours(model, prompts, few, "sequential"),
            f"{args.batch} clips, auto": _ours(model, prompts, few, "auto"),
        }
        times = times_of(batches, args.runs, args.clock)
        one, many, drafts = (statistics.median(values) for values in times.values())
        print(f"batch {args.batch} against 1: {args.batch * one / many:.2f}x the tokens/s")
        print(f"auto against one after another, drafts never right: {many / drafts:.2f}x")


def _ours(model: ARModel, prompts: torch.Tensor, num_tokens: int, way: str) -> Job:
    return lambda: generate(model, prompts, num_tokens, temperature=0.0, decoding=way)


def compare_run(args: argparse.Namespace) -> None:
    """A trained model on held-out clips: passes, tokens/s and equality."""
    source = open_source(args.run)
    model = load_source(source, "float32", 1, "torch")
    lay_out(model)
    clips = TokenDataset(args.data_path, args.split, args.split_string)
    grid = model.latent_shape
    given = args.given_latents * grid.tokens_per_frame
    num_tokens = grid.num_tokens - given
    chosen = torch.linspace(0, len(clips) - 1, min(args.clips, len(clips))).long().tolist()
    prompts = torch.stack([clips[number][:given] for number in chosen])
    print(
        f"{args.run}: grid {tuple(grid)}, {given} given, {num_tokens} decoded, {len(chosen)} clips"
    )
    windows = [int(word) if word.isdigit() else None for word in args.windows.split(",")]
    if args.heads:
        compare_heads(model, prompts, num_tokens, chosen, windows)
        return
    for name, sampling in (("greedy", {"temperature": 0.0}), ("top_p 0.8", SAMPLED)):
        expected = _decode(model, prompts, num_tokens, sampling, chosen, "sequential", None)
        modules = _decode(model, prompts, num_tokens, sampling, chosen, "modules", None)
        print(f"{name}: clips that differ from the modules': {_differing(modules, expected)}")
        for window in windows:
            with Passes() as passes:
                found = _decode(model, prompts, num_tokens, sampling, chosen, "jacobi", window)
            rate = len(chosen) * num_tokens / passes.count
            print(
                f"{name}, window {window or 'auto'}: {rate:.2f} tokens a forward pass; clips that "
                f"differ: {_differing(found, expected)}",
                flush=True,
            )
        size = len(chosen)
        with Passes() as passes:
            found = _decode(model, prompts, num_tokens, sampling, chosen, "jacobi", None, size)
        print(
            f"{name}, one batch of {size}: {num_tokens / passes.count:.2f} tokens of a clip a "
            f"pass; clips that differ: {_differing(found, expected)}",
            flush=True,
        )
    other = peer(model.config)
    few = prompts[: args.timed_clips]
    jobs = {
        f"Hugging Face, {cache}": lambda cache=cache: [
            peer_job(other, cache, row[None], num_tokens)() for row in few
        ]
        for cache in args.peers.split(",")
    }
    for name, sampling in (("greedy", {"temperature": 0.0}), ("top_p 0.8", SAMPLED)):
        ways = [("sequential", None), *(("jacobi", window) for window in windows)]
        for way, window in ways:
            fixed = (few, num_tokens, sampling, chosen, way, window)
            label = "" if way == "sequential" else f" {window or 'auto'}"
            jobs[f"{name}, {way}{label}"] = partial(_decode, model, *fixed)
    for way in ("sequential", "jacobi"):
        fixed = (few, num_tokens, {"temperature": 0.0}, chosen, way, None, len(few))
        jobs[f"greedy, {way}, one batch"] = partial(_decode, model, *fixed)
    show(times_of(jobs, args.runs, args.clock), num_tokens * len(few), next(iter(jobs)))


def compare_heads(
    model: ARModel,
    prompts: torch.Tensor,
    num_tokens: int,
    items: list[int],
    windows: list[int | None],
) -> None:
    """Windows with drafts from the model's Medusa heads, and without."""
    with_heads = model.config
    without = dataclasses.replace(with_heads, num_medusa_heads=0)
    for name, sampling in (("greedy", {"temperature": 0.0}), ("top_p 0.8", SAMPLED)):
        expected = _decode(model, prompts, num_tokens, sampling, items, "sequential", None)
        for window in windows:
            rates, differing = [], 0
            foretold = right = torch.zeros(())
            for model.config in (without, with_heads):
                with Passes() as passes:
                    for row, item in enumerate(items):
                        counts = HeadCounts()
                        found = generate(
                            model,
                            prompts[row : row + 1],
                            num_tokens,
                            items=[item],
                            decoding="jacobi",
                            window=window,
                            head_counts=counts,
                            **sampling,
                        )
                        differing += _differing(found, expected[row : row + 1])
                        if len(counts.foretold):
                            foretold = foretold + counts.foretold.sum(0)
                            right = right + counts.right.sum(0)
                rates.append(len(items) * num_tokens / passes.count)
            shares = ", ".join(f"{share:.2f}" for share in (right / foretold).tolist())
            print(
                f"{name}, window {window or 'auto'}: {rates[0]:.2f} tokens a pass without heads, "
                f"{rates[1]:.2f} with; of what they foretold came {shares}; clips that differ: "
                f"{differing}",
                flush=True,
            )


def _decode(
    model: ARModel,
    prompts: torch.Tensor,
    num_tokens: int,
    sampling: dict[str, float],
    items: list[int],
    way: str,
    window: int | None,
    batch_size: int = 1,
) -> torch.Tensor:
    """Clips in batches."""
    found = []
    for start in range(0, len(prompts), batch_size):
        rows = prompts[start : start + batch_size]
        numbers = items[start : start + len(rows)]
        settings = {"decoding": way, "window": window, "items": numbers, **sampling}
        found.append(generate(model, rows, num_tokens, **settings))
    return torch.cat(found)


def _differing(found: torch.Tensor, expected: torch.Tensor) -> int:
    return int((found != expected).any(1).sum())


def main() -> None:
    """One comparison; see above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="30M")
    parser.add_argument("--num_tokens", type=int, default=1280)
    parser.add_argument("--prompt_tokens", type=int, default=256)
    parser.add_argument("--peers", default="dynamic,static")
    parser.add_argument("--modules", action="store_true", help="also through Megatron's modules")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: of a thread")
    parser.add_argument("--run", help="a trained model, in place of a shape")
    parser.add_argument("--heads", action="store_true", help="its Medusa heads, in place of speed")
    parser.add_argument("--data_path", help="its data set")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--split_string", default="98,1,1")
    parser.add_argument("--given_latents", type=int, default=2)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--timed_clips", type=int, default=3)
    parser.add_argument("--windows", default="auto,4,8,16,32,64")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.run:
        compare_run(args)
    else:
        compare_shape(args)


if __name__ == "__main__":
    main()
