"""Whether a model, a tokenizer and a clip's size belong together.

Flows in: the contract that a checkpoint was trained under (as the data set's manifest has it), a
tokenizer and a geometry. Flows out: nothing, or one sentence that says what differs.
"""

from __future__ import annotations

from cosmos_posttrain.checkpoint.source import CheckpointSource
from cosmos_posttrain.data.contract import Contract, TokenizerInfo
from cosmos_posttrain.errors import CheckpointError, GeometryError, TokenizerError
from cosmos_posttrain.geometry import ClipGeometry, Compression

_TRY_ANYWAY = "or try anyway with --allow_tokenizer_mismatch"


def read_contract(source: CheckpointSource) -> Contract | None:
    """What the checkpoint was trained on; None where it does not say.

    Raises:
        CheckpointError: a Video2World model.
    """
    if source.config.is_video2world:
        raise CheckpointError(
            f"{source.path or 'this'} is a Video2World model, which needs a text; this version "
            "generates from images and videos only: give a base model."
        )
    return source.contract


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
    if trained.sha256 != tokenizer.sha256 or tuple(trained.levels) != tuple(tokenizer.levels):
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
