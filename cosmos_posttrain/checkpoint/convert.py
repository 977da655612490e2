"""Conversion of a checkpoint into another form.

Flows in: any model path that ``open_source`` reads. Flows out: a folder in one of ``FORMATS`` (see
``targets``), and a small ``conversion.json`` that says what it was made from. Weights keep their
dtype and every bit.

A folder appears under its name only when it is complete. No model is built and no GPU is used;
memory is needed for a few tensors of one layer at a time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain import files, launch
from cosmos_posttrain.checkpoint import context
from cosmos_posttrain.checkpoint.source import Source, open_source
from cosmos_posttrain.config import setting
from cosmos_posttrain.errors import CheckpointError, ConfigError, OutputFolderError

FORMATS = ("pt", "megatron", "nemo", "safetensors")
MARKER = "conversion.json"
# What a checkpoint in any form consists of, whoever wrote it: --overwrite replaces these.
_KNOWN = ("weights", "context", "model.pt", "config.json", "model*.safetensors*", MARKER)


@dataclass
class ConvertConfig:
    """Settings of ``convert_checkpoint.py``.

    Attributes:
        source: any model path, see ``open_source``.
        target: the folder to write.
        target_format: one of ``FORMATS``.
        overwrite: replace what an earlier conversion (or checkpoint) left in the target.
        verify: read the written tensors back and compare each with the source's.
        model_config: config.json or size of a source that does not say what it holds.
        max_shard_gb: largest file of a ``safetensors`` target, in 10^9 bytes.
    """

    source: str = ""
    target: str = ""
    target_format: str = setting("", choices=FORMATS)
    overwrite: bool = False
    verify: bool = False
    model_config: str | None = None
    max_shard_gb: float = 5.0

    def validate(self) -> None:
        """Refuses settings that are missing or unknown.

        Raises:
            ConfigError: lists every problem.
        """
        problems = [
            f"--{name} is missing" for name in ("source", "target") if not getattr(self, name)
        ]
        if self.target_format not in FORMATS:
            problems.append(
                f"--target_format {self.target_format or '(not given)'} is not one of "
                f"{', '.join(FORMATS)}"
            )
        if not 0 < self.max_shard_gb < float("inf"):
            problems.append(f"--max_shard_gb {self.max_shard_gb} must be above 0")
        if launch.world_size() > 1:
            problems.append("conversion runs in one process: start it with plain python")
        if problems:
            raise ConfigError("; ".join(problems) + ".")


def convert(config: ConvertConfig) -> None:
    """Converts a checkpoint; see the module's docstring.

    Raises:
        ConfigError: settings that are missing or unknown.
        CheckpointError: the source is missing or damaged, or ``verify`` found a difference.
        OutputFolderError: the target holds something else, or the disk is too small.
    """
    config.validate()
    source = open_source(config.source, model_config=config.model_config)
    if source.path is None:
        raise CheckpointError(
            f"{config.source} has no files to convert; name a checkpoint, for example one that "
            "training wrote."
        )
    target = Path(config.target).resolve()
    from cosmos_posttrain.checkpoint import plain, targets

    wanted = _identity(source, config)
    if _is_complete(target, source, wanted, config.overwrite):
        if config.verify:
            targets.verify(plain.open_weights(source), open_source(target))
        compared = ", and every tensor equals the source's" if config.verify else ""
        print(f"{config.target} already holds this conversion{compared}; nothing to do.")
        return
    weights = plain.open_weights(source)
    num_bytes = targets.num_bytes(weights)
    temporary = _temporary(target)
    try:
        files.check_free_space(target, num_bytes, f"{config.target}")
        # Left there by a conversion that was killed.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        max_shard_bytes = int(config.max_shard_gb * 1e9)
        targets.write(source, weights, config.target_format, temporary, max_shard_bytes)
        if config.verify:
            targets.verify(weights, open_source(temporary))
        _write_marker(temporary, {"source": str(source.path), **wanted})
        _move(temporary, target)
    except OSError as error:
        raise OutputFolderError(
            f"{config.target} cannot be written ({error.strerror or error}); make room, or choose "
            "another --target."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    compared = ", each compared with the source's" if config.verify else ""
    count = len(weights.tensors())
    print(f"wrote {config.target}: {count} tensors, {num_bytes / 1e9:.3f} GB{compared}.")


def _identity(source: Source, config: ConvertConfig) -> dict[str, Any]:
    """What makes one conversion the same as another: compared with the target's marker."""
    identity: dict[str, Any] = {
        "target_format": config.target_format,
        "source_files": _fingerprint(source),
    }
    if config.target_format == "safetensors":
        identity["max_shard_gb"] = config.max_shard_gb
    return identity


def _temporary(target: Path) -> Path:
    """Where the conversion is written: beside the target, from where it is renamed.

    A mounted volume cannot be renamed to, and what is beside it lies on another disk.
    """
    folder = target if target.is_mount() else target.parent
    return folder / f".{target.name}.converting"


def _files(source: Source) -> list[Path]:
    assert source.path is not None
    if source.kind == "pt":
        return [source.path / "model.pt", source.path / "config.json"]
    if source.kind == "safetensors":
        from cosmos_posttrain.checkpoint import safetensors_file

        return [*safetensors_file.files(source.path), source.path / "config.json"]
    weights = [path for path in source.weights.iterdir() if path.is_file()]
    names = ("model.json", "data.json", "io.json", "model.yaml")
    context_files = [source.path / "context" / name for name in names]
    return sorted(weights) + [path for path in context_files if path.is_file()]


def _fingerprint(source: Source) -> str:
    """Tells sources apart without reading them: their config, and their files' names, sizes, times.

    The config counts because ``--model_config`` may have replaced the folder's own.
    """
    assert source.path is not None
    files = [path for path in _files(source) if path.exists()]
    stats = [(str(p.relative_to(source.path)), p.stat()) for p in files]
    entries: list[Any] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    text = json.dumps([source.config.to_json(), *entries])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_complete(target: Path, source: Source, wanted: dict[str, Any], overwrite: bool) -> bool:
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
    if overwrite or _is_empty(target):
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
    recorded = marker.get("files")
    if not isinstance(recorded, dict) or recorded != _sizes(target, list(recorded)):
        raise OutputFolderError(
            f"{target} holds this conversion, but files were changed or removed since; give "
            "--overwrite to write it again."
        )
    return True


def _is_empty(target: Path) -> bool:
    """Absent, or nothing in it but what a killed conversion onto a mounted volume left."""
    return not target.is_dir() or all(path == _temporary(target) for path in target.iterdir())


def _read_marker(target: Path) -> dict[str, Any] | None:
    if not (target / MARKER).is_file():
        return None
    try:
        return context.read_json(target / MARKER)
    except CheckpointError:
        return None


def _sizes(folder: Path, names: list[str]) -> dict[str, int]:
    """Bytes of the files that are there."""
    paths = {name: folder / name for name in names}
    return {name: path.stat().st_size for name, path in paths.items() if path.is_file()}


def _write_marker(folder: Path, values: dict[str, Any]) -> None:
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    files.write_json(folder / MARKER, {**values, "files": _sizes(folder, names)})


def _move(temporary: Path, target: Path) -> None:
    """Gives the complete folder its name; files of other kinds in the target stay."""
    if temporary.parent != target and _is_empty(target):
        temporary.replace(target)
        return
    marker = _read_marker(target) or {}
    old = {target / Path(name).parts[0] for name in marker.get("files", {})}
    old |= {path for pattern in _KNOWN for path in target.glob(pattern)}
    old |= {target / path.name for path in temporary.iterdir()}
    # The marker goes first and comes last: without it the folder counts as incomplete.
    for path in sorted(old, key=lambda path: path.name != MARKER):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == MARKER):
        path.replace(target / path.name)
