"""Conversion of a checkpoint into another form: ``model.pt``, or Megatron's distributed folder.

Flows in: any model path that ``open_source`` reads. Flows out: a folder with ``model.pt`` and
``config.json`` (format ``pt``), or with ``weights/`` and ``context/`` (format ``megatron``), and a
small ``conversion.json`` that says what it was made from. Weights keep their dtype and every bit.

A folder appears under its name only when it is complete. No model is built and no GPU is used;
memory is needed for the weights once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.source import Source, open_source
from cosmos_posttrain.errors import CheckpointError, ConfigError, OutputFolderError
from cosmos_posttrain.models.config import to_reference

FORMATS = ("pt", "megatron")
MARKER = "conversion.json"
# What a conversion writes into its target, in the order in which it is moved there.
_ENTRIES = ("weights", "context", "model.pt", "config.json", MARKER)


@dataclass
class ConvertConfig:
    """Settings of ``convert_checkpoint.py``.

    Attributes:
        source: a Hugging Face id, a folder with model.pt and config.json, a checkpoint or run
            folder of this package.
        target: the folder to write.
        target_format: ``pt`` or ``megatron``.
        overwrite: replace what an earlier conversion (or checkpoint) left in the target.
        verify: read the written tensors back and compare each with the source's.
    """

    source: str = ""
    target: str = ""
    target_format: str = ""
    overwrite: bool = False
    verify: bool = False

    def validate(self) -> None:
        """Refuses settings that are missing or unknown.

        Raises:
            ConfigError: lists every problem.
        """
        problems = [f"--{name} is missing" for name in ("source", "target") if not self[name]]
        if self.target_format not in FORMATS:
            problems.append(
                f"--target_format {self.target_format or '(not given)'} is not one of "
                f"{', '.join(FORMATS)}"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            problems.append("conversion runs in one process: start it with plain python")
        if problems:
            raise ConfigError("; ".join(problems) + ".")

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)


def convert(config: ConvertConfig) -> None:
    """Converts a checkpoint; see the module's docstring.

    Raises:
        ConfigError: settings that are missing or unknown.
        CheckpointError: the source is missing or damaged, or ``verify`` found a difference.
        OutputFolderError: the target holds something else.
    """
    config.validate()
    source = open_source(config.source)
    if source.path is None:
        raise CheckpointError(
            f"{config.source} has no files to convert; name a checkpoint, for example one that "
            "training wrote."
        )
    target = Path(config.target).absolute()
    wanted = {"target_format": config.target_format, "source_files": _fingerprint(source)}
    if _is_complete(target, source, wanted, config.overwrite):
        print(f"{config.target} already holds this conversion; nothing to do.")
        return
    temporary = target.with_name(f".{target.name}.converting")
    # Left there by a conversion that was killed.
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        count, num_bytes = _write(source, config.target_format, temporary)
        if config.verify:
            _verify(source, temporary)
        _write_marker(temporary, {"source": str(source.path), **wanted})
        _move(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    compared = ", each compared with the source's" if config.verify else ""
    print(f"wrote {config.target}: {count} tensors, {num_bytes / 1e9:.3f} GB{compared}.")


def _files(source: Source) -> list[Path]:
    assert source.path is not None
    if source.kind == "pt":
        return [source.path / "model.pt", source.path / "config.json"]
    weights = [path for path in source.path.glob("weights/*") if path.is_file()]
    context_files = [source.path / "context" / name for name in ("model.json", "data.json")]
    return sorted(weights) + [path for path in context_files if path.is_file()]


def _fingerprint(source: Source) -> str:
    """Tells sources apart without reading them: names, sizes and times of their files."""
    assert source.path is not None
    stats = [(str(p.relative_to(source.path)), p.stat()) for p in _files(source)]
    text = json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_complete(target: Path, source: Source, wanted: dict[str, str], overwrite: bool) -> bool:
    """True where the target holds this very conversion; False where it may be written.

    Raises:
        OutputFolderError: the target holds something else, or the source itself.
    """
    assert source.path is not None
    origin = source.path.resolve()
    if origin == target.resolve() or target.resolve() in origin.parents:
        raise OutputFolderError(
            f"{target} holds the source itself; choose another --target, nothing was changed."
        )
    if target.exists() and not target.is_dir():
        raise OutputFolderError(f"{target} is a file; choose a folder as --target.")
    if overwrite or not target.is_dir() or not any(target.iterdir()):
        return False
    marker = _read_marker(target)
    if marker is None:
        raise OutputFolderError(
            f"{target} holds something else than a conversion; choose an empty or new folder, or "
            "give --overwrite."
        )
    if any(marker.get(key) != value for key, value in wanted.items()):
        raise OutputFolderError(
            f"{target} holds a conversion of {marker.get('source')} to "
            f"{marker.get('target_format')} that differs from this one; choose another folder, or "
            "give --overwrite."
        )
    if marker.get("files") != _sizes(target):
        raise OutputFolderError(
            f"{target} holds this conversion, but files were changed or removed since; give "
            "--overwrite to write it again."
        )
    return True


def _read_marker(target: Path) -> dict[str, Any] | None:
    if not (target / MARKER).is_file():
        return None
    try:
        return context.read_json(target / MARKER)
    except CheckpointError:
        return None


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file that belongs to a conversion, apart from the marker."""
    files = [path for name in _ENTRIES[:-1] for path in [folder / name, *folder.glob(f"{name}/*")]]
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(files) if p.is_file()}


def _write_marker(folder: Path, values: dict[str, Any]) -> None:
    context.write_json(folder / MARKER, {**values, "files": _sizes(folder)})


def _write(source: Source, target_format: str, folder: Path) -> tuple[int, int]:
    """Writes the weights and the config; returns the number of tensors and their bytes."""
    import torch

    from cosmos_posttrain.checkpoint import mapping, plain

    if target_format == "pt":
        # Parts of a stacked tensor would keep, and save, the whole of it: copy those.
        copy = source.kind != "pt"
        state = {k: v.clone() if copy else v for k, v in plain.read_reference(source)}
        state = {name: state[name] for name in mapping.reference_names(source.config)}
        torch.save(state, folder / "model.pt")
        dtype = next(iter(state.values())).dtype
        values = to_reference(_with_dtype(source, dtype).config)
        context.write_json(folder / "config.json", values)
    else:
        state = dict(plain.read_megatron(source))
        (folder / "weights").mkdir()
        plain.write_megatron(folder / "weights", source.config, state.items())
        dtype = next(iter(state.values())).dtype
        context.write_context(folder, _with_dtype(source, dtype).config, source.data)
    return len(state), sum(tensor.nbytes for tensor in state.values())


def _with_dtype(source: Source, dtype: object) -> Source:
    """The source with the dtype that its weights really have."""
    params_dtype = str(dtype).removeprefix("torch.")
    config = dataclasses.replace(source.config, params_dtype=params_dtype)
    return dataclasses.replace(source, config=config)


def _verify(source: Source, written: Path) -> None:
    """Reads everything back.

    Raises:
        CheckpointError: names the first tensor that differs.
    """
    import torch

    from cosmos_posttrain.checkpoint import plain

    pairs = zip(
        plain.read_reference(source), plain.read_reference(open_source(written)), strict=True
    )
    for (name, before), (name_after, after) in pairs:
        assert name == name_after
        # As bytes: NaN must equal itself.
        same = before.dtype == after.dtype and before.shape == after.shape
        if not same or not torch.equal(_as_bytes(before), _as_bytes(after)):
            raise CheckpointError(
                f"{name} differs after writing; nothing was kept. Check the disk and try again."
            )


def _as_bytes(tensor: Any) -> Any:
    import torch

    return tensor.contiguous().view(torch.uint8)


def _move(temporary: Path, target: Path) -> None:
    """Gives the complete folder its name; files of other kinds in the target stay."""
    if not target.exists() or not any(target.iterdir()):
        temporary.replace(target)
        return
    for name in reversed(_ENTRIES):
        old = target / name
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)
    for name in _ENTRIES:
        if (temporary / name).exists():
            (temporary / name).replace(target / name)
