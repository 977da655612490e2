"""Writes a jsonl file of clips and captions for videos in the layout of IRASim's BridgeData V2.

Flows in: a folder with ``annotation/SPLIT/ID.json``, whose ``texts`` are captions and whose
``videos`` name files of the folder; the small world writes such folders too. Flows out: a line
``{"prompt": ..., "visual_input": ...}`` for each text of each video, for prepare_dataset.py:

    python recipes/bridge_prompts.py --input_dir bridge --split train --output bridge_train.jsonl
    python prepare_dataset.py --input_jsonl bridge_train.jsonl --text_encoder_path ...
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmos_posttrain import files
from cosmos_posttrain.errors import UserError
from cosmos_posttrain.launch import run_cli, say


def read_annotation(path: Path, folder: Path) -> tuple[list[str], list[Path]]:
    """Captions and videos of one episode.

    Raises:
        UserError: the file is no annotation.
    """
    value: Any = files.read_json(path, UserError, "copy it again")
    texts, videos = value.get("texts"), value.get("videos")
    fits = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    fits = fits and isinstance(videos, list) and len(videos) > 0
    names = [video.get("video_path") for video in videos if isinstance(video, dict)] if fits else []
    if not fits or len(names) < len(videos) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f'{path} is no annotation: it needs "texts": [...] and "videos": [{{"video_path": '
            "...}]."
        )
    return [text.strip() for text in texts if text.strip()], [folder / name for name in names]


def lines(folder: Path, split: str, output: Path) -> Iterator[str]:
    """A line for each text of each video, by episode; says how many episodes have no text.

    Raises:
        UserError: there are no annotations, or one is damaged.
    """
    paths = sorted((folder / "annotation" / split).glob("*.json"), key=_number_or_name)
    if not paths:
        raise UserError(f"{folder} holds no annotation/{split}/*.json; name another --input_dir.")
    is_inside = output.resolve().is_relative_to(folder.resolve())
    num_silent = 0
    for path in paths:
        texts, videos = read_annotation(path, folder)
        num_silent += not texts
        for text in texts:
            for video in videos:
                # From the jsonl file on where both can move together, else from the root on.
                name = os.path.relpath(video, output.parent) if is_inside else video.resolve()
                yield json.dumps({"prompt": text, "visual_input": str(name)}, ensure_ascii=False)
    if num_silent:
        say(f"note: {num_silent} of {len(paths)} episodes have no text and are left out.", True)


def _number_or_name(path: Path) -> tuple[int, str]:
    return (int(path.stem) if path.stem.isdecimal() else -1, path.stem)


def main() -> None:
    """Parses the command line and writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--input_dir", type=Path, required=True, help="folder with annotation/")
    parser.add_argument("--split", default="train", help="train, val or test")
    parser.add_argument("--output", type=Path, required=True, help="jsonl file to write")
    args = parser.parse_args()
    found = list(lines(args.input_dir, args.split, args.output))
    files.write_text(args.output, "".join(f"{line}\n" for line in found))
    say(f"wrote {len(found)} lines into {args.output}.")


if __name__ == "__main__":
    run_cli(main)
