"""Small T5 models in every form that folders of them have, and transformers' own embeddings.

Flows in: a folder and a form. Flows out: the folder, filled as transformers or PyTorch would; or
what transformers itself makes of prompts with such a folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cosmos_posttrain

TINY = Path(cosmos_posttrain.__file__).parent / "text" / "weights" / "tiny"
PROMPTS = [
    "The red ball moves to the left.",
    "a",
    "Größe, 漢字 and 😀: what no vocabulary holds",
    "the camera pans to the right while two boxes and a striped cone fall behind the star",
    "PICK UP THE VESSEL, then put it on the table.",
    "numbers 1 23 456",
    "</s> and <0x41> are written out",
    "the red ball moves to the right",
]


def small_model(gated: bool = False) -> Any:
    """A T5 with its decoder, and weights large enough that every part of it counts."""
    from transformers import T5Config, T5ForConditionalGeneration

    vocab_size = len(json.loads((TINY / "tokenizer.json").read_text())["model"]["vocab"])
    config = T5Config(
        vocab_size=vocab_size + 10,  # as T5's own, which are padded
        d_model=32,
        d_kv=8,
        num_heads=3,
        d_ff=48,
        num_layers=3,
        feed_forward_proj="gated-gelu" if gated else "relu",
        n_positions=20,
    )
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def _whole(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def _in_parts(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="60KB")


def _encoder_alone(model: Any, folder: Path) -> None:
    from transformers import T5EncoderModel

    alone = T5EncoderModel(model.config)
    alone.load_state_dict(model.state_dict(), strict=False)
    alone.save_pretrained(folder)


def _pickle(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _old_pickle(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    path = folder / "pytorch_model.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)


def _pickle_in_parts(model: Any, folder: Path) -> None:
    model.config.save_pretrained(folder)
    state = model.state_dict()
    weight_map = {}
    for part in (0, 1):
        file = f"pytorch_model-{part + 1:05d}-of-00002.bin"
        tensors = {name: state[name] for name in sorted(state)[part::2]}
        torch.save(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


FORMS: dict[str, Callable[[Any, Path], None]] = {
    "safetensors": _whole,
    "safetensors in parts": _in_parts,
    "safetensors of the encoder alone": _encoder_alone,
    "PyTorch's file": _pickle,
    "PyTorch's old file": _old_pickle,
    "PyTorch's files in parts": _pickle_in_parts,
}


def write_t5(folder: Path, form: str = "safetensors", gated: bool = False) -> Path:
    """A folder with a small T5 and the shipped tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    FORMS[form](small_model(gated), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    return folder


def transformers_rows(folder: Path, prompts: Sequence[str], length: int, padding: bool) -> Any:
    """Each prompt's rows as transformers makes them: padded to ``length``, the rest zeroed.

    Args:
        folder: a folder that transformers reads.
        prompts: texts.
        length: to which prompts are cut.
        padding: run all of them at once, padded to ``length``; else one by one, unpadded.

    Returns:
        (B, length, width) float32.
    """
    from transformers import AutoTokenizer, T5EncoderModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = T5EncoderModel.from_pretrained(folder).eval()
    batches: list[list[str]] = [list(prompts)] if padding else [[prompt] for prompt in prompts]
    rows: list[Tensor] = []
    for batch in batches:
        tokens = tokenizer(
            batch,
            return_tensors="pt",
            padding="max_length" if padding else False,
            truncation=True,
            max_length=length,
        )
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        with torch.no_grad():
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        hidden = hidden * mask[..., None]
        rows += torch.nn.functional.pad(hidden, (0, 0, 0, length - hidden.shape[1]))
    return torch.stack(rows)
