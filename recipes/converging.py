"""Does every layout learn the same? Loss curves of short runs, against the same run in one process.

Renders a small world, prepares it, and trains a tiny model on it again and again with the scripts
that anybody uses; prints a table of the largest relative differences (docs/converging.md), which is
also written to WORK/converging.md. Exit code 1 where one is above its bound. On two CPU cores; run
it again and it goes on where it stopped.

    python recipes/converging.py --work_dir WORK
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from cosmos_posttrain import files
from cosmos_posttrain.errors import CosmosPosttrainError
from cosmos_posttrain.launch import run_cli

REPOSITORY = Path(__file__).resolve().parents[1]
NUM_STEPS, EVERY, SAME = 20, 5, 1e-4
# Logits of 17 positions at a time, where the run beside it has those of all 96 at once.
IN_PIECES = """
import runpy
from cosmos_posttrain.models import config
config.LOGITS_AT_ONCE["cpu"] = 1 << 14
runpy.run_path("train_general.py", run_name="__main__")
"""
TP = "--tensor_model_parallel_size 2"
PP = "--pipeline_model_parallel_size 2"
INTERLEAVED = f"{PP} --virtual_pipeline_model_parallel_size 2"
LORA, AVERAGE = "--lora_rank 4", "--ema_decay 0.9 --z_loss_coefficient 0.01"
BFLOAT16 = "--dtype bfloat16"
OFFLOAD = "--optimizer_cpu_offload"


@dataclass(frozen=True)
class Run:
    """One run of ``NUM_STEPS`` steps.

    Attributes:
        what: its name in the table; empty where it is only compared with.
        num_processes: that torchrun starts; 1 is plain python.
        flags: beside those that all runs have.
        against: the run whose curve it should have.
        after: the run whose first steps are its own, and how many; it goes on from its checkpoint.
        bound: on the largest relative difference of the losses.
        is_in_pieces: computes the loss in pieces.
    """

    what: str
    num_processes: int = 1
    flags: str = ""
    against: str = "one"
    after: tuple[str, int] | None = None
    bound: float = SAME
    is_in_pieces: bool = False


LAYOUTS = {
    "tp": Run("TP 2", 2, TP),
    "tp_sp": Run("TP 2, sequence parallel", 2, f"{TP} --sequence_parallel"),
    "pp": Run("PP 2", 2, PP),
    "pp_interleaved": Run("PP 2, interleaved in 2 parts", 2, INTERLEAVED),
    "cp": Run("CP 2", 2, "--context_parallel_size 2"),
    "dp": Run("DP 2", 2),
}
RUNS = {
    "one": Run(""),
    "again": Run("the same command again", bound=0.0),
    **LAYOUTS,
    "dp_again": Run("DP 2, the same command again", 2, against="dp", bound=0.0),
    "tp_recompute": Run("TP 2, full recompute", 2, f"{TP} --recompute"),
    "pieces": Run("loss in pieces, against all logits at once", is_in_pieces=True),
    "tp_pieces": Run("loss in pieces at TP 2", 2, TP, is_in_pieces=True),
    "lora": Run("", flags=LORA),
    "lora_tp": Run("LoRA at TP 2", 2, f"{TP} {LORA}", "lora"),
    "average": Run("", flags=AVERAGE),
    "average_tp": Run("EMA and z-loss at TP 2", 2, f"{TP} {AVERAGE}", "average"),
    "resumed": Run("resumed after 10 steps in one process", after=("one", 10), bound=0.0),
    **{
        f"resumed_{name}": Run(
            f"resumed after 10 steps at {run.what}",
            run.num_processes,
            run.flags,
            after=("one", 10),
        )
        for name, run in LAYOUTS.items()
    },
    **{
        f"{name}_continued": Run(
            f"{run.what}, stopped after 10 steps and continued",
            run.num_processes,
            run.flags,
            against=name,
            after=(name, 10),
            bound=0.0,
        )
        for name, run in LAYOUTS.items()
    },
    "offload": Run("the optimizer in host memory", flags=OFFLOAD, bound=0.0),
    "offload_dp": Run(
        "the optimizer in host memory at DP 2, against DP 2", 2, OFFLOAD, "dp", bound=0.0
    ),
    "offload_resumed": Run(
        "resumed after 10 steps with the optimizer in host memory",
        flags=OFFLOAD,
        after=("one", 10),
        bound=0.0,
    ),
    "dp_to_tp": Run("DP 2, from step 5 on TP 2", 2, TP, after=("dp", 5)),
    "dp_to_tp_to_one": Run(
        "DP 2, from step 5 on TP 2, from step 10 on TP 1", after=("dp_to_tp", 10)
    ),
    "bfloat16": Run("", flags=BFLOAT16),
    "bfloat16_gradients": Run(
        "in bfloat16, gradients in bfloat16 against float32",
        flags=f"{BFLOAT16} --grad_reduce_in_bf16",
        against="bfloat16",
        bound=0.05,
    ),
}


def call(*command: str | Path) -> None:
    """Runs one of the scripts.

    Raises:
        CosmosPosttrainError: it failed.
    """
    words = [str(word) for word in command]
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env={**os.environ, **variables}, check=False
    )
    if done.returncode:
        raise CosmosPosttrainError(
            f"{shlex.join(['python', *words])} ended with exit code {done.returncode}; see above, "
            "then give the same command again."
        )


def prepare(work: Path) -> None:
    """Renders and encodes the clips, and trains the model that all runs start from."""
    world, tokens = work / "world", work / "tokens"
    call(
        *("-m", "cosmos_posttrain.toy_world", "--output", world, "--level", "simple"),
        *("--num_videos", "40", "--num_val", "4", "--num_test", "4"),
    )
    call(
        *("prepare_dataset.py", "--input_jsonl", world / "prompts_train.jsonl"),
        *("--output_prefix", tokens, "--tokenizer_compression_factor", "8,8,8"),
        *("--encoder_path", "tiny", "--decoder_path", "tiny", "--width", "64"),
        *("--height", "32", "--num_context_frames", "17", "--num_workers", "1"),
    )
    # Fresh weights of later pipeline stages are drawn from other seeds.
    train(work, "start", Run(""), "random:tiny", EVERY)


def train(work: Path, name: str, run: Run, model: str | Path, num_steps: int) -> None:
    """Trains, or goes on, or does nothing where the run is complete."""
    script = ["train_general.py"]
    if run.is_in_pieces:
        files.write_text(work / "in_pieces.py", IN_PIECES)
        script = [str(work / "in_pieces.py")]
    if run.num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        script = [*launcher, str(run.num_processes), *script]
    flags = run.flags.split()
    if "--tensor_model_parallel_size" not in flags:
        flags += ["--tensor_model_parallel_size", "1"]
    call(
        *(*script, "--model_path", model, "--data_path", work / "tokens", "--log_dir"),
        *(work / name, "--split_string", "8,1,1", "--global_batch_size", "4", "--lr", "2e-3"),
        *("--max_steps", str(num_steps), "--save_every_n_steps", str(EVERY)),
        *("--limit_val_batches", "1", "--num_threads", "1", *flags),
    )


def begin(work: Path, name: str, after: tuple[str, int]) -> None:
    """A copy of another run as it was after some of its steps."""
    source, num_steps = after
    if (work / name).exists():
        return
    with files.replacing(work / name) as copy:
        shutil.copytree(work / source, copy, ignore=shutil.ignore_patterns(".lock"))
        for checkpoint in (copy / "default" / "checkpoints").iterdir():
            if int(checkpoint.name.rpartition("=")[2]) >= num_steps:
                shutil.rmtree(checkpoint)


def losses(log_dir: Path) -> list[float]:
    """Of a complete run, step by step."""
    lines = (log_dir / "default" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(NUM_STEPS)), log_dir
    return [row["reduced_train_loss"] for row in rows]


def difference(work: Path, name: str, run: Run) -> float:
    """Largest of all steps, relative to the loss of the run beside it."""
    pairs = zip(losses(work / name), losses(work / run.against), strict=True)
    return max(abs(own - other) / other for own, other in pairs)


def measure(work: Path, runs: dict[str, Run]) -> None:
    """Trains what is missing, prints the table and writes it.

    Raises:
        CosmosPosttrainError: a run failed, or differs by more than its bound.
    """
    work.mkdir(parents=True, exist_ok=True)
    prepare(work)
    lines = ["| run | processes | flags | largest difference | bound |", "|---|---|---|---|---|"]
    beyond = []
    for name, run in runs.items():
        if run.after is not None:
            begin(work, name, run.after)
        train(work, name, run, work / "start", NUM_STEPS)
        if not run.what:
            continue
        found = difference(work, name, run)
        if found > run.bound:
            beyond.append(f"{run.what} {found:.1e}")
        flags = f"`{run.flags}`" if run.flags else ""
        cells = f"{run.what} | {run.num_processes} | {flags} | {found:.1e} | {run.bound:.0e}"
        lines.append(f"| {cells} |")
    files.write_text(work / "converging.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    if beyond:
        raise CosmosPosttrainError(f"beyond their bounds: {', '.join(beyond)}.")


def main() -> None:
    """Measures all runs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work_dir", type=Path, default=Path("converging_output"))
    measure(parser.parse_args().work_dir.resolve(), RUNS)


if __name__ == "__main__":
    run_cli(main)
