"""From a path or a name to a ready tokenizer.

Flows in: a shipped name, a native folder, a folder or file of TorchScript, or a Hugging Face id.
Flows out: a :class:`VideoTokenizer`.

TorchScript files are run once on a small clip, which finds their rate and refuses foreign ones.
Then, unless ``native=False``, their weights move into the native network, which runs long clips in
chunks, in any dtype, and compiled, and is faster; tokens are equal but where a latent lies within a
rounding error of a border between two codes. Files whose network is another than the native one run
as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from cosmos_posttrain import hub, launch
from cosmos_posttrain.errors import TokenizerError
from cosmos_posttrain.geometry import Compression, parse_compression
from cosmos_posttrain.tokenizer.export import (
    AUTOENCODER_FILE,
    config_beside,
    import_torchscript,
    network_from_scripts,
)
from cosmos_posttrain.tokenizer.native import (
    NativeBackend,
    load_native,
    native_backend,
    read_network,
)
from cosmos_posttrain.tokenizer.network import DVNetwork
from cosmos_posttrain.tokenizer.shipped import SHIPPED
from cosmos_posttrain.tokenizer.torchscript import ScriptDecoder, ScriptEncoder, load_script
from cosmos_posttrain.tokenizer.video_tokenizer import VideoTokenizer
from cosmos_posttrain.tokenizer.weights_io import CONFIG_FILE, WEIGHTS_FILE, check_sha256

_HUB_FILES = ("encoder.jit", "decoder.jit", CONFIG_FILE, WEIGHTS_FILE)
# Whose repositories a checkpoint may name without the user's naming them too.
_PUBLISHER = "nvidia/"
# Largest mean difference of codes in [-1, 1] between a file and the native network with its
# weights. Rounding in bfloat16 gives about 0.03, another network 0.3 and more.
_MAX_CODE_DIFFERENCE = 0.1

Encoder = NativeBackend | ScriptEncoder
Decoder = NativeBackend | ScriptDecoder


def load_tokenizer(
    path: str | Path,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    compression: str | Sequence[int] | None = None,
    *,
    native: bool | None = None,
    compile: bool = False,
) -> VideoTokenizer:
    """Loads a tokenizer, encoder and decoder.

    Args:
        path: ``tiny-dv4x8x8``, ``tiny-dv8x8x8``, ``tiny-dv8x16x16``, ``tiny`` (the one of
            ``compression``), a folder with ``config.json`` and ``model.safetensors``, a folder
            with ``encoder.jit`` and ``decoder.jit`` or with ``autoencoder.jit`` alone, one of
            these files, or a Hugging Face id.
        device: see :func:`cosmos_posttrain.launch.device`.
        dtype: to compute in; None means the checkpoint's own on a GPU and float32 on the CPU.
        compression: the compression that the tokenizer must have; None takes any.
        native: what runs TorchScript files: None the native network where it reproduces them, else
            the files themselves; True the native network or an error; False the files themselves,
            bit for bit (``autoencoder.jit`` always runs natively).
        compile: see :meth:`VideoTokenizer.compile`.

    Raises:
        TokenizerError: if it cannot be loaded or has another compression.
    """
    return load_tokenizer_pair(
        path, path, compression, device, dtype, native=native, compile=compile
    )


def load_tokenizer_pair(
    encoder_path: str | Path,
    decoder_path: str | Path,
    compression: str | Sequence[int] | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | str | None = None,
    *,
    native: bool | None = None,
    compile: bool = False,
    expected_sha256: str | None = None,
) -> VideoTokenizer:
    """Loads the encoder from one path and the decoder from another; see :func:`load_tokenizer`.

    Args:
        encoder_path: see :func:`load_tokenizer`.
        decoder_path: see :func:`load_tokenizer`.
        compression: see :func:`load_tokenizer`.
        device: see :func:`load_tokenizer`.
        dtype: see :func:`load_tokenizer`.
        native: see :func:`load_tokenizer`.
        compile: see :func:`load_tokenizer`.
        expected_sha256: of the encoder; another one is refused before TorchScript runs.

    Raises:
        TokenizerError: if one cannot be loaded, they are not of the same rate and levels, or the
            encoder has other weights than expected.
    """
    wanted = None if compression is None else parse_compression(compression)
    device = launch.device(device)
    dtype = launch.parse_dtype(dtype)
    encoder_file = _locate(encoder_path, "encoder", wanted)
    decoder_file = _locate(decoder_path, "decoder", wanted)
    encoder: Encoder
    decoder: Decoder
    if encoder_file.suffix == decoder_file.suffix == ".jit" and encoder_file != decoder_file:
        encoder, decoder = _load_scripts(
            encoder_file, decoder_file, native, device, dtype, expected_sha256
        )
    else:
        encoder = _load_encoder(encoder_file, native, device, dtype, expected_sha256)
        if encoder_file == decoder_file:
            assert isinstance(encoder, NativeBackend)
            decoder = encoder
        else:
            decoder = _load_decoder(decoder_file, native, device, dtype)
    tokenizer = VideoTokenizer(encoder, decoder, _identity(encoder_path, wanted), device)
    if wanted is not None and tokenizer.compression != wanted:
        raise TokenizerError(
            f"{encoder_path} compresses by {tokenizer.compression.name}, but "
            f"{wanted.name} was asked for; give its own tokenizer_compression_factor "
            f"({tokenizer.compression}) or another tokenizer."
        )
    check_sha256(encoder_path, tokenizer.sha256, expected_sha256)
    if compile:
        tokenizer.compile()
    return tokenizer


def check_recorded(path: str) -> None:
    """Refuses a tokenizer that a file names, not the user, if code in it could run.

    TorchScript is code, and whoever wrote the file may have written that too. Shipped weights and
    local native folders hold none; of the hub only the publisher's repositories are taken, at the
    publisher's own revision (anyone may propose another).

    Raises:
        TokenizerError: anything else.
    """
    if path in ("tiny", *SHIPPED.values()):
        return
    if Path(path).exists():
        with contextlib.suppress(TokenizerError):
            if _locate(path, "encoder", None).is_dir():
                return
    elif hub.looks_like_hub_id(path) and path.startswith(_PUBLISHER) and "@" not in path:
        return
    raise TokenizerError(
        f"the tokenizer {path!r} is named by the checkpoint and not by you, and is neither shipped "
        f"with this package, nor a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, nor one of "
        f"{_PUBLISHER.rstrip('/')}'s repositories; if you trust it, name it with --encoder_path."
    )


def load_network(path: str | Path, compression: Compression | None = None) -> DVNetwork:
    """The network of any path that :func:`load_tokenizer` takes, on the CPU, in its own dtype.

    Args:
        path: as :func:`load_tokenizer`'s.
        compression: which one ``tiny`` means; nothing else is refused for it.

    Raises:
        TokenizerError: if it cannot be loaded, or TorchScript that is no DV network.
    """
    local = _resolve(path, compression)
    files = [_locate(local, role, compression) for role in ("encoder", "decoder")]
    if files[0].is_dir():
        return read_network(files[0])
    return network_from_scripts({file: load_script(file) for file in files})


def _identity(path: str | Path, compression: Compression | None) -> str:
    """The name that a manifest records: as given, with ``tiny`` made specific."""
    if str(path) == "tiny" and compression is not None:
        return SHIPPED[compression]
    return str(path)


def _resolve(path: str | Path, compression: Compression | None) -> Path:
    """A local file or folder for any accepted spelling."""
    name = str(path)
    if name == "tiny":
        if compression is None:
            raise TokenizerError(
                "tokenizer 'tiny' needs a compression factor; give "
                "--tokenizer_compression_factor, or one of " + ", ".join(SHIPPED.values()) + "."
            )
        if compression not in SHIPPED:
            raise TokenizerError(
                f"there is no tiny tokenizer of {compression.name}; use one of "
                + ", ".join(Compression(*key).name for key in SHIPPED)
                + "."
            )
        name = SHIPPED[compression]
    if name in SHIPPED.values():
        return Path(__file__).parent / "weights" / name
    if Path(name).exists():
        return Path(name)
    if not hub.looks_like_hub_id(name):
        raise TokenizerError(
            f"{name} does not exist; give a folder, a .jit file, a Hugging Face id, or one of "
            + ", ".join(SHIPPED.values())
            + "."
        )
    return hub.resolve(name, allow_patterns=_HUB_FILES)


def _locate(path: str | Path, role: str, compression: Compression | None) -> Path:
    """The native folder or the .jit file that ``role``, encoder or decoder, is read from."""
    local = _resolve(path, compression)
    if local.is_dir():
        if (local / CONFIG_FILE).is_file() and (local / WEIGHTS_FILE).is_file():
            return local
        for name in (f"{role}.jit", AUTOENCODER_FILE):
            if (local / name).is_file():
                return local / name
        raise TokenizerError(
            f"{path} holds neither {CONFIG_FILE} and {WEIGHTS_FILE} nor {role}.jit; "
            "give a tokenizer's folder."
        )
    if local.suffix == ".jit":
        if local.name == AUTOENCODER_FILE:
            return local
        other = "decoder" if role == "encoder" else "encoder"
        return local.with_name(local.name.replace(other, role))
    if local.name in (CONFIG_FILE, WEIGHTS_FILE):
        return local.parent
    raise TokenizerError(
        f"{path} is not a tokenizer; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, "
        "or a .jit file."
    )


def _load_encoder(
    file: Path,
    native: bool | None,
    device: torch.device,
    dtype: torch.dtype | None,
    expected_sha256: str | None,
) -> Encoder:
    """The encoder alone, of a decoder that lies elsewhere."""
    if file.suffix == ".jit" and file.name != AUTOENCODER_FILE:
        _refuse_half(file, native)
        return ScriptEncoder(file, device, dtype, expected_sha256)
    return _load_whole(file, native, device, dtype)


def _load_decoder(
    file: Path, native: bool | None, device: torch.device, dtype: torch.dtype | None
) -> Decoder:
    """The decoder alone, of an encoder that lies elsewhere."""
    if file.suffix == ".jit" and file.name != AUTOENCODER_FILE:
        _refuse_half(file, native)
        return ScriptDecoder(file, device, dtype)
    return _load_whole(file, native, device, dtype)


def _refuse_half(file: Path, native: bool | None) -> None:
    if native:
        raise TokenizerError(
            f"{file} is one half and its other half is no .jit file; native=True needs both "
            "halves as .jit files, or a native folder for each."
        )


def _load_whole(
    file: Path, native: bool | None, device: torch.device, dtype: torch.dtype | None
) -> NativeBackend:
    """A native folder or ``autoencoder.jit``."""
    if file.is_dir():
        return load_native(file, device, dtype)
    if native is False:
        raise TokenizerError(
            f"{file} can only run natively, it has no call that gives tokens; leave native=False "
            "out, or give encoder.jit and decoder.jit."
        )
    return native_backend(import_torchscript(file), device, dtype)


def _load_scripts(
    encoder_file: Path,
    decoder_file: Path,
    native: bool | None,
    device: torch.device,
    dtype: torch.dtype | None,
    expected_sha256: str | None,
) -> tuple[Encoder, Decoder]:
    """Two TorchScript files, natively where that is wanted and gives the same."""
    if AUTOENCODER_FILE in (encoder_file.name, decoder_file.name):
        return (
            _load_encoder(encoder_file, native, device, dtype, expected_sha256),
            _load_decoder(decoder_file, native, device, dtype),
        )
    encoder = ScriptEncoder(encoder_file, device, dtype, expected_sha256)
    decoder = ScriptDecoder(decoder_file, device, dtype)
    for file, half in ((encoder_file, encoder), (decoder_file, decoder)):
        _check_config_beside(file, half.compression)
    same = encoder.compression == decoder.compression and encoder.levels == decoder.levels
    if native is False or not same:
        return encoder, decoder  # the caller refuses halves of two tokenizers
    try:
        scripts = {encoder_file: encoder.module, decoder_file: decoder.module}
        backend = native_backend(network_from_scripts(scripts), device, dtype)
        difference = _code_difference(encoder, backend)
        if not difference < _MAX_CODE_DIFFERENCE:
            raise TokenizerError(
                f"{encoder_file} and the native network with its weights give codes that differ by "
                f"{difference:.2f} on average: it is another network; load it with native=False."
            )
    except TokenizerError:
        if native:
            raise
        return encoder, decoder
    return backend, backend


def _check_config_beside(file: Path, compression: Compression) -> None:
    """Refuses a file whose folder's ``config.json`` says another rate."""
    config = config_beside(file)
    if config is not None and config.compression != compression:
        raise TokenizerError(
            f"{file} compresses by {compression.name}, but the {CONFIG_FILE} beside it says "
            f"{config.compression.name}; put the right one there, or remove it."
        )


def _code_difference(encoder: ScriptEncoder, backend: NativeBackend) -> float:
    """Mean difference of the codes of a small random clip."""
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 9, 64, 64, generator=generator) * 2 - 1
    device = backend.network.quant_conv.conv3d.weight.device
    with torch.inference_mode():
        pair = [
            backend.network.quantizer.indices_to_codes(half.encode(video.to(device, half.dtype)))
            for half in (encoder, backend)
        ]
        if pair[0].shape != pair[1].shape:
            return float("inf")
        return float((pair[0] - pair[1]).abs().mean())
