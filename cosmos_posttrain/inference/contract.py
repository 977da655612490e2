"""Whether a model, a tokenizer, a text encoder and a clip's size belong together.

Flows in: the contract that a checkpoint was trained under (as the data set's manifest has it), a
tokenizer, a text encoder, a geometry and a request's text. Flows out: nothing, or one sentence that
says what differs.
"""

from __future__ import annotations

from cosmos_posttrain.data.contract import Contract, TextEncoderInfo, TokenizerInfo
from cosmos_posttrain.errors import ConfigError, GeometryError, TextError, TokenizerError
from cosmos_posttrain.geometry import ClipGeometry, Compression
from cosmos_posttrain.inference.config import PLAIN_INPUT_TYPES, TEXT_INPUT_TYPES
from cosmos_posttrain.inference.request import Request
from cosmos_posttrain.models.config import ModelConfig

_TRY_ANYWAY = "or try anyway with --allow_tokenizer_mismatch"


def _clip(num_frames: int, height: int, width: int) -> str:
    return f"{num_frames} frames of {width}x{height}"


def check_geometry(contract: Contract, geometry: ClipGeometry) -> None:
    """Refuses a clip of another size than those that the checkpoint was trained on.

    Raises:
        GeometryError: names both sizes.
    """
    trained, wanted = contract.clip, geometry
    sizes = [(c.num_frames, c.height, c.width) for c in (trained, wanted)]
    if sizes[0] != sizes[1]:
        raise GeometryError(
            f"the checkpoint was trained on clips of {_clip(*sizes[0])}, but {_clip(*sizes[1])} "
            "were asked for; leave out --num_context_frames, --width and --height, "
            f"{_TRY_ANYWAY}."
        )


def check_compression(contract: Contract, compression: Compression) -> None:
    """Refuses another compression factor than the checkpoint's tokenizer has.

    Raises:
        TokenizerError: names both.
    """
    trained = Compression(*contract.tokenizer.compression)
    if trained != compression:
        raise TokenizerError(
            f"the checkpoint was trained on tokens of {contract.tokenizer.id} ({trained.name}), "
            f"but {compression.name} was asked for; give --tokenizer_compression_factor {trained} "
            f"and that tokenizer, {_TRY_ANYWAY}."
        )


def check_tokenizer(contract: Contract, tokenizer: TokenizerInfo) -> None:
    """Refuses another tokenizer than the checkpoint's; weights count, not names.

    Raises:
        TokenizerError: names both.
    """
    check_compression(contract, Compression(*tokenizer.compression))
    trained = contract.tokenizer
    is_other = trained.sha256 not in ("", tokenizer.sha256)  # "": tokens that came without it
    if is_other or tuple(trained.levels) != tuple(tokenizer.levels):
        raise TokenizerError(
            f"the checkpoint was trained on tokens of {trained.id} (sha256 {trained.sha256[:12]}), "
            f"but {tokenizer.id} has other weights (sha256 {tokenizer.sha256[:12]}); give "
            f"--encoder_path {trained.id}, {_TRY_ANYWAY}."
        )


def check_vocabulary(vocab_size: int, tokenizer: TokenizerInfo) -> None:
    """Refuses a tokenizer whose tokens are not the model's; no flag allows it.

    Raises:
        TokenizerError: names both sizes.
    """
    if vocab_size != tokenizer.vocab_size:
        raise TokenizerError(
            f"{tokenizer.id} has {tokenizer.vocab_size} tokens and the model {vocab_size}; give a "
            "tokenizer of the model's vocabulary, or post-train the model on this one first."
        )


def check_text_size(context_len: int, width: int, name: str, rows: int, columns: int) -> None:
    """Refuses a text encoder whose embeddings the model cannot take; no flag allows it.

    Args:
        context_len: rows of a text that the model takes.
        width: numbers in each.
        name: of the encoder.
        rows: that it makes at most.
        columns: numbers in each.

    Raises:
        TextError: names both sizes.
    """
    if (rows, columns) != (context_len, width):
        raise TextError(
            f"the model takes a text of {context_len} rows of {width} numbers, but the text "
            f"encoder {name} makes {rows} of {columns}; give the model's own with "
            "--text_encoder_path."
        )


def check_text_encoder(trained: TextEncoderInfo, name: str, sha256: str) -> None:
    """Refuses another text encoder than the checkpoint's; weights count, not names.

    Raises:
        TextError: names both.
    """
    if trained.sha256 != sha256:
        raise TextError(
            f"the checkpoint was trained on texts of {trained.id} (sha256 {trained.sha256[:12]}), "
            f"but {name} has other weights (sha256 {sha256[:12]}); give --text_encoder_path "
            f"{trained.id}, {_TRY_ANYWAY}."
        )


def check_text(request: Request, model: ModelConfig, name: str) -> None:
    """Refuses a text for a base model, and asks a Video2World model's request for one.

    Args:
        request: with or without a text.
        model: the model's numbers.
        name: what it is called.

    Raises:
        ConfigError: a text too many or too few.
        GeometryError: a context of another size than the model's.
    """
    if not model.is_video2world:
        if request.has_text or request.prompts or request.guidance_scale != 1:
            raise ConfigError(
                f"{name} is a base model, which takes no text; leave out prompt, negative_prompt "
                "and guidance_scale, or give a Video2World model."
            )
        return
    if not request.has_text:
        raise ConfigError(
            f"{name} is a Video2World model, which needs a text; give a prompt that says what is "
            "to be seen."
        )
    context, width = request.context, model.context_dim
    if context is None:
        return
    is_rows = context.ndim == 2 and context.is_floating_point() and context.shape[1] == width
    if not is_rows or context.shape[0] > model.context_len:
        raise GeometryError(
            f"the given context is {tuple(context.shape)} {context.dtype}; this session takes "
            f"(L, {width}) floats, L at most {model.context_len}."
        )


def check_input_type(input_type: str | None, model: ModelConfig, name: str) -> None:
    """Refuses a type of input that is of the other kind of model.

    Raises:
        ConfigError: names both.
    """
    if input_type in TEXT_INPUT_TYPES and not model.is_video2world:
        raise ConfigError(
            f"--input_type {input_type} is for Video2World models and {name} is a base model; "
            f"give {input_type.removeprefix('text_and_')}, or leave it out."
        )
    if input_type in PLAIN_INPUT_TYPES and model.is_video2world:
        raise ConfigError(
            f"--input_type {input_type} is for base models and {name} is a Video2World model, "
            f"which needs a text; give text_and_{input_type}, or leave it out."
        )


def check_tokens(given: TokenizerInfo, tokenizer: TokenizerInfo, allows_others: bool) -> None:
    """Refuses tokens that another tokenizer made than the session's; weights count, not names.

    Args:
        given: that made the tokens; its sha256 is "" where they came without it.
        tokenizer: the session's.
        allows_others: whether only the vocabulary must be the same.

    Raises:
        TokenizerError: names both.
    """
    check_vocabulary(given.vocab_size, tokenizer)
    same_rate = tuple(given.compression) == tuple(tokenizer.compression)
    if allows_others or (same_rate and given.sha256 in ("", tokenizer.sha256)):
        return
    raise TokenizerError(
        f"the given tokens are of {given.id} and the model's tokenizer is {tokenizer.id}, which "
        f"has other weights; give tokens of the model's own, {_TRY_ANYWAY}."
    )
