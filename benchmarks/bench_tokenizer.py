"""Tokenizer speed: the native network against TorchScript of the same weights, in one process.

Two TorchScript forms, so two ratios, each that of the medians of encode + decode seconds:

- ``published layout``: the network as the published files are built (``plain_dv.py``: Conv3d on
  (B, C, T, H, W), explicit padding, wavelets as convolutions). What native saves a user of those.
- ``our export``: what ``export_torchscript`` writes. It is traced from the native layers and so has
  their layout: expect about 1, the rest being what ``tokenizer/folding.py`` folds.

All run in turn on the same clip; their outputs are compared first.

    python benchmarks/bench_tokenizer.py                       # CPU, float32, one thread
    python benchmarks/bench_tokenizer.py --device cuda --dtype bfloat16 --compile
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout, not installed

from plain_dv import plain_torchscript

from cosmos_posttrain import launch
from cosmos_posttrain.tokenizer.export import export_torchscript
from cosmos_posttrain.tokenizer.loading import load_network
from cosmos_posttrain.tokenizer.native import NativeBackend, native_backend
from cosmos_posttrain.tokenizer.network import DVConfig, DVNetwork
from cosmos_posttrain.tokenizer.torchscript import load_script

PUBLISHED = {
    "random:4x8x8": {"patch_size": 2, "spatial_compression": 8, "temporal_compression": 4},
    "random:8x8x8": {"spatial_compression": 8},
    "random:8x16x16": {},
}
DEFAULT_CASES = ("tiny-dv4x8x8:17,96,160", "tiny-dv8x16x16:17,96,160", "random:8x16x16:17,128,128")


def build(name: str) -> DVNetwork:
    """A shipped or given tokenizer, or the published size with random weights."""
    if name in PUBLISHED:
        torch.manual_seed(0)
        return DVNetwork(DVConfig(**PUBLISHED[name])).eval().requires_grad_(False)
    return load_network(name)


def candidates(network: DVNetwork, video, device, dtype, compile) -> dict[str, tuple]:
    """Encoder and decoder of each form, as functions of the video and of the indices."""
    native = native_backend(network, device, dtype)
    forms = {"native": (native.encode, native.decode)}
    if compile:
        compiled = NativeBackend(native.network, "")
        compiled.compile()
        forms["native, compiled"] = (compiled.encode, compiled.decode)
    plain = plain_torchscript(native.network, video, native.encode(video))
    with tempfile.TemporaryDirectory() as folder:
        paths = export_torchscript(native.network, Path(folder))
        exported = [load_script(path).to(device) for path in paths]
    for name, (encoder, decoder) in (("published layout", plain), ("our export", exported)):
        forms[name] = (lambda clip, run=encoder: run(clip)[0], decoder)
    return forms


def seconds(function, argument) -> float:
    """Wall-clock seconds of one call."""
    if argument.is_cuda:
        torch.cuda.synchronize(argument.device)
    started = time.perf_counter()
    function(argument)
    if argument.is_cuda:
        torch.cuda.synchronize(argument.device)
    return time.perf_counter() - started


def run_case(case: str, args: argparse.Namespace) -> dict:
    """Times one tokenizer at one clip size."""
    name, _, size = case.rpartition(":")
    num_frames, height, width = (int(value) for value in size.split(","))
    device, dtype = launch.device(args.device), launch.parse_dtype(args.dtype)
    video = torch.rand(args.batch_size, 3, num_frames, height, width, device=device) * 2 - 1
    video = video.to(dtype)
    forms = candidates(build(name), video, device, dtype, args.compile)
    indices = forms["native"][0](video)
    decoded = forms["native"][1](indices)
    check = {}
    for form, (encode, decode) in forms.items():  # also warms up, and compiles
        for _ in range(2):
            equal = (encode(video) == indices).float().mean().item()
            difference = (decode(indices) - decoded).abs().max().item()
        check[form] = {"equal_indices": equal, "largest_pixel_difference": difference}
        if dtype == torch.float32 and (equal < 0.99 or difference > 1e-3):
            raise SystemExit(f"{form} does not compute what the native network does: {check[form]}")
    times: dict[str, list[tuple[float, float]]] = {form: [] for form in forms}
    for _ in range(args.runs):
        for form, (encode, decode) in forms.items():
            times[form].append((seconds(encode, video), seconds(decode, indices)))
    result = {"case": case, "device": args.device, "dtype": args.dtype, "threads": args.threads}
    result |= {"batch_size": args.batch_size, "runs": args.runs, "forms": {}}
    frames = args.batch_size * num_frames
    for form, pairs in times.items():
        encode_s, decode_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        result["forms"][form] = {
            "encode_frames_per_second": frames / encode_s,
            "decode_frames_per_second": frames / decode_s,
            "seconds": encode_s + decode_s,
            **check[form],
        }
    native_s = result["forms"]["native"]["seconds"]
    result["native_speedup_over"] = {
        form: values["seconds"] / native_s
        for form, values in result["forms"].items()
        if form != "native"
    }
    return result


def show(result: dict) -> None:
    """Prints one case as a table."""
    print(f"{result['case']}  {result['device']} {result['dtype']}, {result['threads']} thread(s)")
    for form, values in result["forms"].items():
        speedup = result["native_speedup_over"].get(form)
        ratio = "" if speedup is None else f"  native is {speedup:.2f}x as fast as this"
        print(
            f"  {form:18s} encode {values['encode_frames_per_second']:8.1f}  "
            f"decode {values['decode_frames_per_second']:8.1f} frames/s{ratio}"
        )


def main() -> None:
    """Runs the cases, prints them, and writes them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case",
        action="append",
        help="TOKENIZER:FRAMES,HEIGHT,WIDTH; the tokenizer is a path, a shipped name or "
        f"{', '.join(PUBLISHED)} (default: {' and '.join(DEFAULT_CASES)})",
    )
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="also time torch.compile")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is deprecated")
    results = []
    with torch.inference_mode():
        for case in args.case or DEFAULT_CASES:
            results.append(run_case(case, args))
            show(results[-1])
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
