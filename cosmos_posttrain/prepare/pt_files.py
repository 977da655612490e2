"""Video2World data of the original recipe, taken over without videos or prompts.

Flows in: its folder. Flows out: a prepared folder. The original wrote for each clip

    SPLIT_video_N.pt   (1 + T * H * W + 64,) integers: <bov>, the clip's tokens, <pad>
    SPLIT_prompt_N.pt  (context_len, width) floats: the prompt's embedding, zero rows behind it

with SPLIT train, val or test, and at the end ``metadata.json`` with the number of clips of each.
Tensors are all that is ever read of a ``.pt`` file: what would run code is a failure. Neither the
prompts' texts nor the encoders are recorded there, so the caller names the encoders, and a prompt
has the name of its file in place of a text. Our splits replace the original's.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from cosmos_posttrain import launch
from cosmos_posttrain.data.contract import Contract, make_contract
from cosmos_posttrain.data.indexed import token_dtype
from cosmos_posttrain.data.layout import PROMPTS_PER_SHARD, prompt_shard_name, shard_name
from cosmos_posttrain.data.manifest import DocumentRow, Failure, Manifest
from cosmos_posttrain.data.prompts import PromptRow
from cosmos_posttrain.errors import UserError
from cosmos_posttrain.files import read_json
from cosmos_posttrain.prepare.config import PrepareConfig, geometry
from cosmos_posttrain.prepare.encoders import PreparationEncoders
from cosmos_posttrain.prepare.folder import (
    OutputFolder,
    recorded_contract,
    write_prompt_shard,
    write_shard,
)
from cosmos_posttrain.prepare.sources import VideoSource, sources_sha256
from cosmos_posttrain.text.rows import STORED_DTYPES, pack_rows

_COUNTS_FILE = "metadata.json"
_SPLITS = ("train", "val", "test")
_NAME = re.compile(r"(train|val|test)_(video|prompt)_(0|[1-9]\d*)\.pt")


class _UnfitFileError(Exception):
    """A file that is not taken over; says why, as the end of a sentence."""


def import_pt_files(config: PrepareConfig, encoders: PreparationEncoders) -> Manifest:
    """Takes the folder ``config.input_pt_dir`` over, or goes on with it; on one process.

    Raises:
        UserError: it is not such a folder, or not complete; or the output is another data set.
        SaveError: the disk is full; finished shards stay.
    """
    assert config.input_pt_dir is not None
    clips = list_clips(Path(config.input_pt_dir))
    contract, plan = _job(config, encoders, clips)
    prompts = _Prompts(clips, contract)
    shards = _in_parts(clips, config.videos_per_shard)
    prompt_shards = _in_parts(prompts.files, PROMPTS_PER_SHARD)
    output = OutputFolder(
        Path(config.output_prefix), contract, plan, len(shards), len(prompt_shards)
    )
    to_do = output.start(config.overwrite)
    if to_do is None:
        launch.say(f"{output.folder} is complete already; nothing to do.")
        return Manifest.load(output.folder)
    for number in output.missing_prompts():
        prompts.write_shard(output.folder, number, prompt_shards[number])
    for number in to_do:
        _write_clips(output.folder, number, shards[number], contract, prompts)
    manifest = output.finish()
    launch.say(f"took {manifest.num_documents} clips over from {config.input_pt_dir}.")
    return manifest


@dataclass(frozen=True)
class PtClip:
    """The two files of a clip."""

    video: Path
    prompt: Path


def list_clips(folder: Path) -> list[PtClip]:
    """All clips of a folder, by split and number.

    Raises:
        UserError: it is no such folder, or a file is missing.
    """
    if not folder.is_dir():
        raise UserError(f"the folder {folder} does not exist; name one that the original wrote.")
    path = folder / _COUNTS_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} has no {_COUNTS_FILE}, which the original writes last: it is not its "
            "Video2World data, or not complete."
        )
    counts = read_json(path, UserError, "prepare the data again from the videos")
    present = {match.group() for item in folder.iterdir() if (match := _NAME.fullmatch(item.name))}
    clips = []
    for split in _SPLITS:
        count = counts.get(f"{split}_samples", 0)
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise UserError(f"{path} is damaged: its {split}_samples is {count!r}.")
        for number in range(count):
            names = [f"{split}_{what}_{number}.pt" for what in ("video", "prompt")]
            for name in names:
                if name not in present:
                    raise UserError(
                        f"{folder / name} is missing, but {_COUNTS_FILE} says that there are "
                        f"{count} clips of {split}; copy the folder again."
                    )
            clips.append(PtClip(folder / names[0], folder / names[1]))
    if not clips:
        raise UserError(f"{path} says that there is no clip.")
    return clips


def _job(
    config: PrepareConfig, encoders: PreparationEncoders, clips: Sequence[PtClip]
) -> tuple[Contract, dict[str, Any]]:
    """The contract of the encoders that the caller names, and the plan."""
    tokenizer = encoders.tokenizer_facts()
    earlier = None if config.overwrite else recorded_contract(Path(config.output_prefix))
    text = encoders.text_facts(earlier, is_needed=False)
    contract = make_contract(
        tokenizer.info,
        geometry(config),
        token_dtype(tokenizer.info.vocab_size),
        text.info,
        text.context_len,
    )
    files = [path for clip in clips for path in (clip.video, clip.prompt)]
    plan = {
        "num_sources": len(clips),
        "sources_sha256": sources_sha256([VideoSource(path.name, path) for path in files]),
        "videos_per_shard": config.videos_per_shard,
    }
    return contract, plan


def _in_parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[first : first + size] for first in range(0, len(items), size)]


class _Prompts:
    """The distinct prompts of some clips, told apart by their embeddings.

    Attributes:
        files: one of each prompt.
        numbers: of the prompt in a file.
        problems: why the prompt of another file is not taken over.
    """

    def __init__(self, clips: Sequence[PtClip], contract: Contract) -> None:
        assert contract.text_encoder is not None and contract.context_len is not None
        self._info, self._context_len = contract.text_encoder, contract.context_len
        self.files: list[Path] = []
        self.numbers: dict[Path, int] = {}
        self.problems: dict[Path, str] = {}
        found: dict[bytes, int] = {}
        for clip in clips:
            try:
                stored = self._stored(clip.prompt)
            except _UnfitFileError as error:
                self.problems[clip.prompt] = str(error)
                continue
            number = found.setdefault(hashlib.sha256(stored.data).digest(), len(found))
            if number == len(self.files):
                self.files.append(clip.prompt)
            self.numbers[clip.prompt] = number

    def _stored(self, path: Path) -> Any:
        rows = read_rows(path, self._context_len, self._info.width)
        return pack_rows(rows, self._info.dtype)

    def write_shard(self, folder: Path, number: int, files: Sequence[Path]) -> None:
        """Writes the prompts of some files."""
        prompts = []
        for path in files:
            stored = self._stored(path)
            prompts.append((PromptRow(path.name, stored.size // self._info.width), stored))
        dtype = STORED_DTYPES[self._info.dtype]
        write_prompt_shard(folder, prompt_shard_name(number), dtype, prompts, [])


def _write_clips(
    folder: Path, number: int, clips: Sequence[PtClip], contract: Contract, prompts: _Prompts
) -> None:
    """Writes one shard of clips."""
    documents: list[tuple[DocumentRow, Any]] = []
    failures = []
    for clip in clips:
        try:
            if problem := prompts.problems.get(clip.prompt):
                raise _UnfitFileError(problem)
            tokens = read_tokens(clip.video, contract.seq_length, contract.tokenizer.vocab_size)
        except _UnfitFileError as error:
            failures.append(Failure(clip.video.name, str(error)))
            continue
        row = DocumentRow(
            len(documents), clip.video.name, prompt_number=prompts.numbers[clip.prompt]
        )
        documents.append((row, tokens.numpy()))
    write_shard(folder, shard_name(number), contract.dtype, documents, failures, [])


def read_tokens(path: Path, seq_length: int, vocab_size: int) -> Tensor:
    """A clip's tokens, (seq_length,) integers, without ``<bov>`` and padding."""
    tensor = _read_tensor(path)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise _UnfitFileError(f"{path} holds {tensor.dtype}, which is no dtype of tokens.")
    bov, pad = vocab_size, vocab_size + 2
    if tensor.dim() != 1 or not len(tensor) or tensor[0] != bov:
        raise _UnfitFileError(
            f"{path} does not begin with <bov> ({bov}); see that --encoder_path is the tokenizer "
            "that made it."
        )
    is_filled = tensor != pad
    tokens = tensor[1 : int(is_filled.nonzero()[-1]) + 1]
    if len(tokens) != seq_length:
        raise _UnfitFileError(
            f"{path} holds {len(tokens)} tokens before the padding, not {seq_length}; see that "
            "--width, --height, --num_context_frames and --tokenizer_compression_factor are those "
            "it was made with."
        )
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise _UnfitFileError(
            f"{path} holds tokens from {int(tokens.min())} to {int(tokens.max())}; the vocabulary "
            f"is [0, {vocab_size})."
        )
    return tokens


def read_rows(path: Path, context_len: int, width: int) -> Tensor:
    """A prompt's embedding, (length, width) floats, without the zero rows behind it."""
    tensor = _read_tensor(path)
    if not tensor.is_floating_point() or tuple(tensor.shape) != (context_len, width):
        raise _UnfitFileError(
            f"{path} holds a tensor of {list(tensor.shape)} {tensor.dtype}, but the text encoder "
            f"makes {context_len} rows of {width} numbers; give the one that made it."
        )
    if not tensor.isfinite().all():
        raise _UnfitFileError(f"{path} holds values that are not finite.")
    filled = tensor.any(dim=1).nonzero()
    if not len(filled):
        raise _UnfitFileError(f"{path} holds zeros alone: no prompt.")
    return tensor[: int(filled[-1]) + 1]


def _read_tensor(path: Path) -> Tensor:
    """The one tensor of a file; nothing else of it is ever read or run."""
    try:
        value: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise _UnfitFileError(
            f"{path} holds more than a tensor, or is damaged; nothing of it was run."
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise _UnfitFileError(f"{path} is not readable ({first_line}).") from error
    if not isinstance(value, Tensor) or value.is_sparse or value.is_quantized:
        raise _UnfitFileError(f"{path} holds a {type(value).__name__}, not a plain tensor.")
    return value.detach()
