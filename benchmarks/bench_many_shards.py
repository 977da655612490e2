"""Opening a prepared folder of very many shards: seconds, memory and open files.

Writes a folder of tiny clips (8 tokens each, so that ten million fit on a small disk) if there is
none, then opens its splits in a process that has done nothing else. What opening costs depends on
the number of shards and the length of the names, not on the length of the clips.

    python benchmarks/bench_many_shards.py --folder /tmp/many --num_shards 156250
"""

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cosmos_posttrain.data import Manifest, TokenDataset
from cosmos_posttrain.data.contract import TokenizerInfo, make_contract
from cosmos_posttrain.data.indexed import ShardWriter
from cosmos_posttrain.data.shard_table import ShardInfo, ShardTable
from cosmos_posttrain.data.source_runs import SourceRuns
from cosmos_posttrain.files import sha256_of_file
from cosmos_posttrain.geometry import ClipGeometry, Compression

CLIPS_PER_SHARD = 64


def source(number: int) -> str:
    """A name as data sets of clips have it."""
    return f"part-{number // 6400:05d}/clip-{number:08d}.mp4"


def write_folder(folder: Path, num_shards: int) -> None:
    """A complete folder, as preparation leaves it."""
    folder.mkdir(parents=True)
    geometry = ClipGeometry(1, 32, 64, Compression(8, 16, 16))
    info = TokenizerInfo("synthetic", "0" * 64, (8, 16, 16), (8, 8, 8, 5, 5, 5), 64000)
    contract = make_contract(info, geometry, "uint16")
    tokens = np.random.default_rng(0).integers(0, 64000, (CLIPS_PER_SHARD, contract.seq_length))

    def shards() -> Iterator[ShardInfo]:
        for shard in range(num_shards):
            name = f"shard-{shard:05d}"
            paths = {e: folder / f"{name}.{e}" for e in ("bin", "idx", "jsonl")}
            writer = ShardWriter(paths["bin"], paths["idx"], contract.dtype)
            for document in tokens:
                writer.add(document)
            writer.finish()
            first = shard * CLIPS_PER_SHARD
            rows = [{"document": n, "source": source(first + n)} for n in range(CLIPS_PER_SHARD)]
            paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in rows))
            files = {
                extension: {"sha256": sha256_of_file(path), "num_bytes": path.stat().st_size}
                for extension, path in paths.items()
            }
            yield ShardInfo(name, CLIPS_PER_SHARD, CLIPS_PER_SHARD, files)

    count = num_shards * CLIPS_PER_SHARD
    manifest = Manifest(contract, {"num_sources": count}, count, 0, (), ShardTable(shards()))
    runs = SourceRuns.of((source(number), 1) for number in range(count))
    runs.save(folder, manifest.fingerprint)
    manifest.save(folder)


def main() -> None:
    """Prints a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--num_shards", type=int, default=156_250)
    parser.add_argument("--clips", type=int, default=2000)
    args = parser.parse_args()
    if not args.folder.exists():
        write_folder(args.folder, args.num_shards)
        print("written; start again to measure")  # in a process whose memory is fresh
        return

    def report(what: str, started: tuple[float, float]) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        wall, cpu = (value - begin for value, begin in zip(now(), started, strict=True))
        print(
            f"{what}: {wall:.1f} s ({cpu:.1f} s CPU), {resident / 1e6:.0f} MB, at most "
            f"{peak / 1e6:.0f} MB",
            flush=True,
        )

    def now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    started = now()
    report("imports", started)
    started = now()
    Manifest.load(args.folder)
    report("manifest alone", started)
    started = now()
    train = TokenDataset(args.folder, "train")
    report(f"{len(train):,} training clips", started)
    started = now()
    validation = TokenDataset(args.folder, "validation")
    report(f"{len(validation):,} validation clips", started)
    numbers = np.random.default_rng(0).integers(0, len(train), args.clips)
    started = now()
    for number in numbers:
        train[int(number)]
    report(f"{args.clips:,} random clips", started)
    print(f"{len(os.listdir('/proc/self/fd'))} open files")


if __name__ == "__main__":
    main()
