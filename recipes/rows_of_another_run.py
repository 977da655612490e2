"""A model with one run's layers and another's token rows: a ceiling for any start of rows.

Flows in: two finished runs of one vocabulary and width. Flows out: a safetensors folder, which
``train_general.py --model_path`` reads.
"""

import argparse
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from cosmos_posttrain import files
from cosmos_posttrain.checkpoint.source import open_source
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.transfer.embedding import EMBEDDING, OUTPUT

WEIGHTS = "model.safetensors"
ROWS = {"model.tok_embeddings.weight": EMBEDDING, "model.output.weight": OUTPUT}


def main() -> None:
    """Writes the folder, the weights last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="safetensors folder")
    parser.add_argument("--rows", type=Path, required=True, help="run to take the rows from")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()
    if (args.output / WEIGHTS).is_file():
        print(f"{args.output} is there already")
        return
    rows = open_source(args.rows).open_weights()
    with safe_open(args.model / WEIGHTS, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, disk_name in ROWS.items():
        old = tensors[name]
        tensors[name] = rows.megatron(disk_name)[: len(old)].to(old.dtype).contiguous()
    args.output.mkdir(parents=True, exist_ok=True)
    for path in args.model.iterdir():
        if path.name not in (WEIGHTS, "conversion.json"):
            shutil.copyfile(path, args.output / path.name)
    with files.replacing(args.output / WEIGHTS) as temporary:
        temporary.write_bytes(save(tensors, header))
    print(f"wrote {args.output}: the layers of {args.model}, the rows of {args.rows}")


if __name__ == "__main__":
    run_cli(main)
