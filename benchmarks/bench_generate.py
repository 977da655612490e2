"""Generation speed: our cache of rotated keys against Megatron's own cache, in one process.

Megatron's static cache stores keys before RoPE and rotates all of them again for each new token;
ours stores them rotated. The same weights, prompt and greedy tokens; the two are timed in turn.

    python benchmarks/bench_generate.py --num_tokens 300
"""

import argparse
import statistics
import time

import torch

from cosmos_posttrain import generate, load_model
from cosmos_posttrain.models.attention import CachedSelfAttention
from cosmos_posttrain.models.presets import PRESETS


def seconds(model, prompt: torch.Tensor, num_tokens: int) -> tuple[float, torch.Tensor]:
    """Wall-clock seconds of one greedy generation, and its tokens."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    started = time.perf_counter()
    tokens = generate(model, prompt, num_tokens, temperature=0.0, decoding="modules")
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - started, tokens


def main() -> None:
    """Prints tokens/s of both and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--num_tokens", type=int, default=300)
    parser.add_argument("--prompt_tokens", type=int, default=720)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    model = load_model(f"random:{args.model}")
    prompt = torch.randint(model.config.vocab_size, (1, args.prompt_tokens))
    ours = CachedSelfAttention._adjust_key_value_for_inference
    stock = CachedSelfAttention.__bases__[0]._adjust_key_value_for_inference
    allocate = CachedSelfAttention.__bases__[0]._allocate_memory

    def allocate_here(self, length, batch, width, dtype):
        shape = (length, batch, self.num_query_groups_per_partition, width)
        return torch.empty(shape, dtype=dtype, device=model.device)

    CachedSelfAttention.__bases__[0]._allocate_memory = allocate_here
    times: dict[str, list[float]] = {"rotated keys": [], "Megatron's cache": []}
    tokens = {}
    for run in range(args.runs + 1):
        for name, method in (("rotated keys", ours), ("Megatron's cache", stock)):
            CachedSelfAttention._adjust_key_value_for_inference = method
            elapsed, tokens[name] = seconds(model, prompt, args.num_tokens)
            if run:
                times[name].append(elapsed)
    CachedSelfAttention._adjust_key_value_for_inference = ours
    CachedSelfAttention.__bases__[0]._allocate_memory = allocate
    assert torch.equal(*tokens.values()), "the two caches generated different tokens"
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        slow, fast = (args.num_tokens / pick(times[name]) for pick in (max, min))
        print(f"{name:18s} {args.num_tokens / median:8.1f} tokens/s ({slow:.1f}..{fast:.1f})")
    ours_seconds, stock_seconds = medians.values()
    print(f"ratio of medians   {stock_seconds / ours_seconds:8.2f}")


if __name__ == "__main__":
    main()
