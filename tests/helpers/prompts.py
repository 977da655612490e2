"""A small data set with prompts: the videos of ``prepared.py`` and the shipped text encoder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from cosmos_posttrain.data.contract import TextEncoderInfo, TokenizerInfo, make_contract
from cosmos_posttrain.data.layout import prompt_shard_name, shard_name
from cosmos_posttrain.data.manifest import DocumentRow, Manifest
from cosmos_posttrain.data.prompts import PromptRow
from cosmos_posttrain.geometry import ClipGeometry, Compression
from cosmos_posttrain.prepare.folder import OutputFolder, write_prompt_shard, write_shard
from cosmos_posttrain.prepare.prepare import prepare
from cosmos_posttrain.text import load_text_encoder
from cosmos_posttrain.text.rows import pack_rows
from helpers.prepared import BlockMean, config, make_videos

PROMPTS = ["the red ball moves left", "a blue box falls", "the red ball moves left", "nothing"]


def write_lines(folder: Path, prompts: list[str | None] | None = None) -> Path:
    """Videos and a jsonl file with a line for each prompt; None is a line without one."""
    prompts = prompts or [*PROMPTS, "a star turns"]
    make_videos(folder, len(prompts))
    lines = []
    for number, prompt in enumerate(prompts):
        line = {"visual_input": f"{number}.mp4"}
        lines.append(json.dumps(line if prompt is None else line | {"prompt": prompt}))
    path = folder / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def prepare_prompts(
    lines: Path, output: Path, tokenizer: BlockMean | None = None, **changes: object
) -> Manifest:
    """Prepares the lines with the tiny text encoder: (3, 2, 3) latents, 64 codes."""
    settings = {"input_videos_dir": None, "input_jsonl": str(lines), "text_encoder_path": "tiny"}
    encoder = load_text_encoder("tiny", "cpu")
    settings_of_all = config(lines.parent, output, **(settings | changes))
    return prepare(settings_of_all, tokenizer or BlockMean(), encoder)


def write_prompt_data(
    folder: Path,
    tokens: Tensor,
    latent_shape: tuple[int, int, int],
    contexts: Tensor | None = None,
    levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5),
) -> Path:
    """A complete data set of given tokens, without any video or text encoder.

    Args:
        folder: to write.
        tokens: (num_clips, T * H * W).
        latent_shape: (T, H, W).
        contexts: (num_clips, context_len, width), stored as they are in float32; random without.
        levels: of the tokenizer; their product is the vocabulary.
    """
    contexts = torch.randn(len(tokens), 3, 8) if contexts is None else contexts
    rate = (8, 16, 16)
    time, height, width = latent_shape
    geometry = ClipGeometry(8 * (time - 1) + 1, 16 * height, 16 * width, Compression(*rate))
    info = TokenizerInfo("given", "0" * 64, rate, levels, math.prod(levels))
    text = TextEncoderInfo("given", "1" * 64, contexts.shape[2], "float32")
    contract = make_contract(info, geometry, "uint16", text, contexts.shape[1])
    output = OutputFolder(folder, contract, {"num_sources": len(tokens)}, 1, 1)
    output.start(overwrite=False)
    prompts = [
        (PromptRow(str(number), len(rows)), pack_rows(rows, "float32"))
        for number, rows in enumerate(contexts)
    ]
    write_prompt_shard(folder, prompt_shard_name(0), "float32", prompts, [])
    documents = [
        (DocumentRow(number, f"{number}.mp4", prompt_number=number), clip.numpy())
        for number, clip in enumerate(tokens)
    ]
    write_shard(folder, shard_name(0), "uint16", documents, [], [])
    output.finish()
    return folder
