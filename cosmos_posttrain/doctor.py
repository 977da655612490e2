"""Checks an installation: ``python -m cosmos_posttrain.doctor``.

Flows in: nothing but the machine. Flows out: a table of what is installed, with what to do about
what is missing (``installation.py``), and a table of checks with PASS, FAIL or SKIP, the reason,
and the largest difference; exit code 1 if anything failed.

The shipped case ``golden/base_12b_like`` comes from the public reference implementation: random
weights, with YaRN and grouped queries, one of its sequences, and of its vocabulary the tokens that
occur there (rows of the output layer do not depend on each other, so the logits are the
reference's own). ``golden/dv4x8x8`` holds what this package's tokenizer network gave, where it
agreed with the reference, for weights and a video that are computed here.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosmos_posttrain import files, launch
from cosmos_posttrain.cli import Flag, parse
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.installation import Installed, parts, version_of
from cosmos_posttrain.launch import run_cli

if TYPE_CHECKING:
    import torch

GOLDEN_DIR = Path(__file__).parent / "golden"
AR_CASE = GOLDEN_DIR / "base_12b_like"
TOKENIZER_CASE = GOLDEN_DIR / "dv4x8x8"
TWO_PROCESSES_TIMEOUT_SECONDS = 240

# Largest allowed difference of logits whose standard deviation is 0.6. float32 on the CPU differs
# from the reference only by the order of sums; GPUs add in other orders still. bfloat16 has 8 bits:
# 0.037 was measured on a CPU.
TOLERANCES = {
    ("cpu", "float32"): 1e-5,
    ("cuda", "float32"): 1e-3,
    ("cpu", "bfloat16"): 0.15,
    ("cuda", "bfloat16"): 0.15,
}
NEEDED = ("torch", "numpy")  # by every check
PACKAGES = ("omegaconf", "safetensors", "huggingface_hub")
# Levels of 255 between flat colours before and after an mp4: chroma in half size, 8 bits, x264, and
# torchcodec's rounding.
VIDEO_TOLERANCE = 6.0


@dataclass
class DoctorConfig:
    """Settings of the self-check.

    Attributes:
        quick: leave out what starts two processes.
        worker_output: set by the check itself in the processes that it starts.
    """

    quick: bool = False
    worker_output: str = ""


FLAGS = (Flag("--quick"),)


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        check: what was checked.
        status: PASS, FAIL or SKIP.
        detail: the reason, or the rule.
        difference: the largest difference, where there is one.
    """

    check: str
    status: str
    detail: str = ""
    difference: float | None = None


def _judge(check: str, difference: float, tolerance: float) -> Result:
    status = "PASS" if difference <= tolerance else "FAIL"
    return Result(check, status, f"at most {tolerance:g} is allowed", difference)


def _max_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; infinite where anything is not finite."""
    difference = float((a.cpu().double() - b.cpu().double()).abs().max())
    return difference if difference == difference else float("inf")


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """On a GPU, float32 with all its bits: convolutions round to TF32 unless told otherwise.

    So do matrix products where the environment says so, as in some images.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_ar(layer_spec: str, dtype: str, tensor_parallel: int) -> Iterator[Result]:
    """Logits and greedy tokens of the shipped autoregressive case."""
    from safetensors.torch import load_file

    from cosmos_posttrain.checkpoint.load import load_model
    from cosmos_posttrain.inference.engine import generate

    golden = load_file(AR_CASE / "io.safetensors")
    model = load_model(
        AR_CASE,
        dtype=dtype,
        tensor_model_parallel_size=tensor_parallel,
        layer_spec=layer_spec,
    )
    where = f"{layer_spec} {dtype} TP={tensor_parallel} on {model.device.type}"
    with full_float32():
        difference = _max_difference(model.logits(golden["tokens"]), golden["logits"])
    tolerance = TOLERANCES[model.device.type, dtype]
    yield _judge(f"logits, {where}", difference, tolerance)
    greedy = golden["greedy_tokens"].tolist()
    if dtype != "float32":
        return
    num_condition = json.loads((AR_CASE / "config.json").read_text())["num_condition_tokens"]
    prompt = golden["tokens"][:, :num_condition].long()
    with full_float32():
        generated = generate(model, prompt, len(greedy), temperature=0)[0].tolist()
    wrong = sum(a != b for a, b in zip(generated, greedy, strict=True))
    status = "FAIL" if wrong else "PASS"
    yield Result(f"greedy decoding, {where}", status, f"{wrong} of {len(greedy)} tokens differ")


def tokenizer_case(case: Path = TOKENIZER_CASE) -> tuple[Any, torch.Tensor]:
    """The network and the video (1, 3, 9, 32, 48) of a tokenizer case, computed, not stored."""
    import numpy as np
    import torch

    from cosmos_posttrain.tokenizer.network import DVConfig, DVNetwork

    network = DVNetwork(DVConfig.from_file(case / "config.json")).eval()
    generator = np.random.RandomState(0)  # its stream is frozen for good
    with torch.no_grad():
        for name, parameter in sorted(network.named_parameters()):
            scale = max(parameter[0].numel(), 1) ** -0.5 if parameter.ndim > 1 else 0.1
            values = torch.from_numpy(generator.standard_normal(parameter.shape) * scale)
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(values + 1 if is_norm else values)
    time, height, width = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in (9, 32, 48)), indexing="ij"
    )
    waves = [torch.sin(time / 3 + c + height * (c + 1) / 9 + width / 7) for c in range(3)]
    return network, torch.stack(waves)[None].float()


def check_tokenizer() -> Iterator[Result]:
    """Indices and reconstruction of the shipped tokenizer case, in float32."""
    import torch
    from safetensors.torch import load_file

    golden, device = load_file(TOKENIZER_CASE / "io.safetensors"), launch.device()
    network, video = tokenizer_case()
    network = network.to(device)
    with torch.no_grad(), full_float32():
        indices = network.encode(video.to(device)).cpu()
        decoded = network.decode(golden["indices"].to(device)).cpu()
    wrong = int((indices != golden["indices"]).sum())
    detail = f"{wrong} of {indices.numel()} differ"
    yield Result("tokenizer indices, float32", "FAIL" if wrong else "PASS", detail)
    scale = float(golden["reconstruction"].abs().max())
    difference = _max_difference(decoded, golden["reconstruction"]) / scale
    yield _judge("tokenizer reconstruction (relative)", difference, 1e-4)


def check_checkpoints() -> Iterator[Result]:
    """model.pt -> Megatron -> model.pt in a temporary folder, with every tensor compared."""
    from cosmos_posttrain.checkpoint.config import CheckpointConversionConfig
    from cosmos_posttrain.checkpoint.convert import convert
    from cosmos_posttrain.checkpoint.load import load_model

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        megatron, back = f"{folder}/megatron", f"{folder}/pt"
        convert(CheckpointConversionConfig(str(AR_CASE), megatron, "megatron", verify=True))
        convert(CheckpointConversionConfig(megatron, back, "pt", verify=True))
        before = load_model(AR_CASE, dtype="float32")
        after = load_model(megatron, dtype="float32")
        pairs = zip(before.module.parameters(), after.module.parameters(), strict=True)
        difference = max(_max_difference(a.detach(), b.detach()) for a, b in pairs)
    yield _judge("checkpoint: model.pt -> Megatron -> model.pt", difference, 0.0)


def check_video() -> Iterator[Result]:
    """Flat colours written as an mp4 and read again."""
    import torch

    from cosmos_posttrain.video import decoder_label, read_clips, write_mp4

    colours = torch.tensor([(250, 20, 20), (20, 250, 20), (20, 20, 250), (128, 128, 128)])
    frames = colours.T[:, :, None, None].expand(3, 4, 48, 64).to(torch.uint8).contiguous()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "colours.mp4"
        write_mp4(path, frames, 24)
        read = read_clips(path, [0], 4, 48, 64)[0].frames
    difference = _max_difference(read, frames)
    yield _judge(f"video: mp4 and back, {decoder_label()}", difference, VIDEO_TOLERANCE)


def _transformer_engine_missing() -> str:
    if launch.device().type != "cuda":
        return "needs a GPU"
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed"
    return ""


def _two_processes(quick: bool) -> Iterator[Result]:
    """Starts this module twice under torchrun; on GPUs where there are two, else on the CPU."""
    import torch

    name = "tensor parallel over two processes"
    if quick:
        yield Result(name, "SKIP", "--quick")
        return
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    if torch.cuda.device_count() < 2:
        env["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        # fmt: off
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
            "-m", "cosmos_posttrain.doctor", f"worker_output={output}",
        ]
        # fmt: on
        failure = _run(command, env)
        if failure:
            yield Result(name, "FAIL", failure)
            return
        found = files.read_json(output, ConfigError)["results"]
        yield from (Result(**values) for values in found)


def _run(command: list[str], env: dict[str, str]) -> str:
    """Runs a command; returns what went wrong, or nothing."""
    import psutil  # type: ignore[import-untyped]

    with subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            text, _ = process.communicate(timeout=TWO_PROCESSES_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            # Each worker has a session of its own, so the launcher's end would not be theirs.
            launcher = psutil.Process(process.pid)
            for child in [*launcher.children(recursive=True), launcher]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            return f"not finished after {TWO_PROCESSES_TIMEOUT_SECONDS} s"
    if process.returncode == 0:
        return ""
    errors = [line.strip() for line in text.splitlines() if "rror" in line]
    return errors[0] if errors else f"exit code {process.returncode}"


def _guarded(check: str, run: Callable[[], Iterator[Result]]) -> Iterator[Result]:
    """A check that raises has failed; the others still run."""
    try:
        yield from run()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        yield Result(check, "FAIL", f"{type(error).__name__}: {reason}")


def run_checks(quick: bool) -> Iterator[Result]:
    """All checks that this machine can run, and why it cannot run the others."""
    missing = _transformer_engine_missing()
    for layer_spec in ("torch", "te"):
        for dtype in ("float32", "bfloat16"):
            name = f"logits, {layer_spec} {dtype} TP=1"
            if layer_spec == "te" and missing:
                yield Result(name, "SKIP", missing)
                continue
            run = lambda spec=layer_spec, dtype=dtype: check_ar(spec, dtype, 1)  # noqa: E731
            yield from _guarded(name, run)
    yield from _guarded("tokenizer", check_tokenizer)
    yield from _guarded("checkpoint", check_checkpoints)
    yield from _guarded("video", check_video)
    yield from _guarded("two processes", lambda: _two_processes(quick))


def work(output: Path) -> None:
    """What each of two processes does; rank 0 leaves the results in a file."""
    results = []
    specs = ("torch",) if _transformer_engine_missing() else ("torch", "te")
    for layer_spec in specs:
        for dtype in ("float32", "bfloat16"):
            results += list(check_ar(layer_spec, dtype, 2))
    if launch.is_rank_zero():
        files.write_json(output, {"results": [asdict(result) for result in results]})


def versions() -> list[Installed]:
    """Versions of what matters, with what to do about what is missing, and the devices."""
    rows = [
        *parts(),
        *(Installed(name, version_of(name) or "not installed") for name in PACKAGES),
    ]
    rows.append(Installed("platform", platform.platform()))
    if cannot_run():
        return rows
    import torch

    rows.append(
        Installed("CPU", f"{os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    )
    if not torch.cuda.is_available():
        return [*rows, Installed("GPU", "none")]
    rows.append(Installed("NCCL", ".".join(map(str, torch.cuda.nccl.version()))))
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append(
            Installed(f"GPU {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
        )
    return rows


def cannot_run() -> str:
    """Why no check can run here; empty where they can."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except (ImportError, OSError):
            return f"{name} cannot be imported, so nothing was checked"
    return ""


def _print_tables(rows: list[Installed], results: list[Result]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(title="installation")
    for heading in ("what", "version", "what to do"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, (row.name, row.version, row.advice)))
    console.print(table)
    table = Table("check", "result", "difference", "detail", title="checks")
    colours = {"PASS": "green", "FAIL": "bold red", "SKIP": "yellow"}
    for result in results:
        difference = "" if result.difference is None else f"{result.difference:.1e}"
        status = f"[{colours[result.status]}]{result.status}[/]"
        table.add_row(result.check, status, difference, result.detail)
    console.print(table)


def main() -> int:
    """Runs all checks; returns the exit code."""
    description = "Checks an installation on this machine and prints a table."
    config = parse(DoctorConfig, FLAGS, None, "python -m cosmos_posttrain.doctor", description)
    if config.worker_output:
        work(Path(config.worker_output))
        return 0
    if launch.world_size() > 1:
        raise ConfigError("start the doctor with plain python; it starts processes by itself.")
    rows = versions()
    if reason := cannot_run():
        _print_tables(rows, [])
        print(reason)
        return 1
    results = list(run_checks(config.quick))
    _print_tables(rows, results)
    failed = sum(result.status == "FAIL" for result in results)
    passed = sum(result.status == "PASS" for result in results)
    print(f"{passed} passed, {failed} failed, {len(results) - passed - failed} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    run_cli(main)
