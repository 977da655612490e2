"""``python -m cosmos_posttrain.download``: everything that a recipe needs, for air-gapped clusters.

Flows in: a recipe's size, or Hugging Face ids. Flows out: one folder to carry over:

    TARGET/owner/name/...     the files that this package reads of each repository
    TARGET/download.json      which revision of what, with size and sha256 of every file
    TARGET/SHA256SUMS         the same sums, for ``sha256sum -c``

Every script takes ``TARGET/owner/name`` where it takes a Hugging Face id. What ``--model_sizes``
asks for lies in ``checkpoints/name``, as ``infer.py`` looks for bare names. A download that was
interrupted goes on where it stopped, at the same revision. ``--verify`` compares the folder with
its sums and needs no network.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from cosmos_posttrain import files, hub
from cosmos_posttrain.checkpoint.formats.registry import HUB_FILES
from cosmos_posttrain.cli import Flag, flag_names, parse
from cosmos_posttrain.config import check, setting
from cosmos_posttrain.errors import UserError
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.text import DEFAULT_TEXT_ENCODER

RECORD, SUMS = "download.json", "SHA256SUMS"
RECIPES = ("4B", "12B", "5B-Video2World", "13B-Video2World")
# As the original's command calls them.
MODEL_SIZES = {"4B": "4B", "12B": "12B", "5B": "5B-Video2World", "13B": "13B-Video2World"}
CHECKPOINT_DIR = "checkpoints"
_GUARDRAIL = "nvidia/Cosmos-1.0-Guardrail"
_PUBLISHED_TOKENIZER = "nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
_MODEL = "nvidia/Cosmos-1.0-Autoregressive-{}"
_TOKENIZERS = "nvidia/Cosmos-0.1-Tokenizer-DV4x8x8,nvidia/Cosmos-1.0-Tokenizer-DV8x16x16"
_LICENCES = ("LICENSE*", "NOTICE*")
_FIX = "restore it, or download anew"

# For each role: sets of files, the first of which that a repository has is taken whole.
_FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "model": HUB_FILES,
    "tokenizer": (("encoder.jit", "decoder.jit"), ("model.safetensors", "config.json")),
    "text encoder": (
        ("model*.safetensors", "model.safetensors.index.json", "*.json", "spiece.model"),
        ("pytorch_model*.bin", "*.json", "spiece.model"),
    ),
    "guardrail": (("blocklist/*", "face_blur_filter/*"),),
}


@dataclass
class DownloadConfig:
    """What to fetch, and where to.

    Attributes:
        target: the folder; by default checkpoints, with --model_sizes.
        model_sizes: 4B, 12B, 5B, 13B, one or several; each with its tokenizer and, for 5B and 13B,
            T5-11B, and the guardrail, all where infer.py looks for them by their bare names.
        recipe: a model size; adds its model, two tokenizers and, for Video2World, T5-11B.
        models: further ids ``owner/name[@revision]``, separated by commas.
        tokenizers: ids of tokenizers; replaces the recipe's.
        text_encoder: id of a T5 encoder; replaces the recipe's.
        verify: only compare the folder with its sums.
    """

    target: str = ""
    model_sizes: list[str] = field(default_factory=list)
    recipe: str = setting("", choices=RECIPES)
    models: str = ""
    tokenizers: str = ""
    text_encoder: str = ""
    verify: bool = False

    @property
    def folder(self) -> str:
        """Where everything goes; "" where nobody has said."""
        return self.target or (CHECKPOINT_DIR if self.model_sizes else "")


FLAGS = (
    Flag("--target", aliases=("--checkpoint_dir",)),
    Flag("--model_sizes", takes_many=True),
    Flag("--recipe"),
    Flag("--models"),
    Flag("--tokenizers"),
    Flag("--text_encoder"),
    Flag("--verify"),
)


def wanted(config: DownloadConfig) -> dict[str, str]:
    """The role of every repository that is to be fetched, by its id."""
    sizes = [MODEL_SIZES.get(size, size) for size in config.model_sizes]
    sizes += [config.recipe] if config.recipe else []
    tokenizers, text_encoder = config.tokenizers, config.text_encoder
    if not tokenizers and config.recipe:
        tokenizers = _TOKENIZERS
    elif not tokenizers and sizes:
        tokenizers = _PUBLISHED_TOKENIZER
    if any(size.endswith("Video2World") for size in sizes):
        text_encoder = text_encoder or DEFAULT_TEXT_ENCODER
    models = ",".join(map(_MODEL.format, sizes))
    roles = {"model": f"{models},{config.models}", "tokenizer": tokenizers}
    roles["text encoder"] = text_encoder
    roles["guardrail"] = _GUARDRAIL if config.model_sizes else ""
    return {
        hub_id.strip(): role
        for role, ids in roles.items()
        for hub_id in ids.split(",")
        if hub_id.strip()
    }


def validate(config: DownloadConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = [] if config.folder else ["--target is missing: name a folder"]
    problems += [
        f"--model_sizes {size} is not one of {', '.join(MODEL_SIZES)}"
        for size in config.model_sizes
        if size not in (*MODEL_SIZES, *RECIPES)
    ]
    if not wanted(config) and not config.verify:
        problems.append(
            "nothing to download: give --model_sizes, --recipe, --models or --tokenizers"
        )
    problems += [
        f"{hub_id} is not an id such as nvidia/Cosmos-1.0-Autoregressive-4B[@revision]"
        for hub_id in wanted(config)
        if not hub.looks_like_hub_id(hub_id)
    ]
    check(config, flag_names(FLAGS), problems)


def download(config: DownloadConfig) -> None:
    """Fills the folder; goes on with what an interrupted download left.

    Raises:
        ConfigError: nothing to do, or an id that is none.
        UserError: a repository that cannot be read, or files that arrived damaged.
    """
    validate(config)
    target = Path(config.folder)
    files.check_writable(target, "--target")
    with files.locked(target):
        _fill(target, wanted(config), is_bare=bool(config.model_sizes))


def _fill(target: Path, roles: dict[str, str], is_bare: bool) -> None:
    record = _read_record(target)
    for hub_id, role in roles.items():
        name, revision = hub.split_revision(hub_id)
        entry = record["repositories"].get(name)
        if entry is None:
            entry = record["repositories"][name] = _look_up(name, revision, role)
            if is_bare and role != "text encoder":  # T5 is looked for by its whole name
                entry["folder"] = name.partition("/")[2]
        elif revision not in (None, entry["requested"], entry["commit"]):
            raise UserError(
                f"{target} already has {name} at {entry['requested'] or entry['commit']}, not "
                f"{revision}; choose another --target for that revision."
            )
        missing = sum(info["size"] or 0 for info in entry["files"].values() if not info["done"])
        files.check_free_space(target, missing, name)
        # Written before the files, so that a later run takes the same revision.
        files.write_json(target / RECORD, record)
        _fetch(target, name, entry)
        files.write_json(target / RECORD, record)
    _write_sums(target, record)
    total = sum(info["size"] for _, info in _recorded_files(record))
    print(f"{target}: {total / 1e9:.2f} GB complete; give these paths instead of the ids:")
    for name, entry in record["repositories"].items():
        print(f"  {entry['role']:<12} {target / _place(name, entry)}")


def _place(name: str, entry: dict[str, Any]) -> str:
    """The folder of a repository, below the target."""
    place: str = entry.get("folder", name)
    return place


def _look_up(name: str, revision: str | None, role: str) -> dict[str, Any]:
    """Asks the hub for the commit and the files that are needed."""
    import huggingface_hub

    try:
        info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
    except Exception as error:  # its HTTP library's own errors differ between versions
        raise hub.explain(error, name, revision) from error
    # A path that leads out of the folder is no file of a model.
    siblings = {
        item.rfilename: item
        for item in info.siblings or []
        if not {"..", "/"} & set(PurePosixPath(item.rfilename).parts)
    }
    found = {}
    for path in _choose(name, role, list(siblings)):
        item = siblings[path]
        known = item.lfs.sha256 if item.lfs is not None else None
        found[path] = {"size": item.size, "sha256": known, "blob": item.blob_id, "done": False}
    return {"role": role, "requested": revision, "commit": info.sha, "files": found}


def _choose(name: str, role: str, paths: Sequence[str]) -> list[str]:
    for form in _FORMS[role]:
        chosen = [p for p in paths if any(_matches(p, pattern) for pattern in form)]
        if any(_matches(p, form[0]) for p in chosen):
            return chosen + [p for p in paths if any(_matches(p, one) for one in _LICENCES)]
    raise UserError(f"{name} holds no {role} that this package reads; check the id.")


def _matches(path: str, pattern: str) -> bool:
    if "/" in path and "/" not in pattern:
        return False
    return fnmatch.fnmatchcase(path, pattern)


def _fetch(target: Path, name: str, entry: dict[str, Any]) -> None:
    """Downloads what is not there yet, and checks every file as it arrives."""
    import huggingface_hub

    folder = target / _place(name, entry)
    for number, (path, info) in enumerate(entry["files"].items(), 1):
        local = folder / path
        if info["done"] and local.is_file() and local.stat().st_size == info["size"]:
            continue
        size = (info["size"] or 0) / 1e9
        print(f"[{number}/{len(entry['files'])}] {name}/{path} ({size:.2f} GB)", flush=True)
        try:
            huggingface_hub.hf_hub_download(name, path, revision=entry["commit"], local_dir=folder)
        except Exception as error:  # its HTTP library's own errors differ between versions
            raise hub.explain(error, name, entry["requested"]) from error
        _check_arrival(local, info)
    shutil.rmtree(folder / ".cache", ignore_errors=True)


def _check_arrival(local: Path, info: dict[str, Any]) -> None:
    """Compares a new file with what the hub says of it, and records its sum."""
    data_sum = files.sha256_of_file(local)
    if info["sha256"] is not None:
        same = data_sum == info["sha256"]
    else:
        data = local.read_bytes()  # a small file: git's own sum is all that is known
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False)
        same = info["blob"] in (None, blob.hexdigest())
    if not same:
        local.unlink()
        raise UserError(f"{local} arrived damaged and was removed; run the same command again.")
    info |= {"size": local.stat().st_size, "sha256": data_sum, "done": True}


def _read_record(target: Path) -> dict[str, Any]:
    path = target / RECORD
    if not path.is_file():
        if files.foreign_names(target, lambda name: name == RECORD):
            raise UserError(f"{target} holds something else than a download; name a new folder.")
        return {"repositories": {}}
    record = files.read_json(path, UserError, _FIX)
    try:
        for _, info in _recorded_files(record):
            info["size"], info["sha256"], info["done"]
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged: it lacks what was fetched; {_FIX}.") from error
    return record


def _recorded_files(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Paths below the target, with what is known of them."""
    for name, entry in record["repositories"].items():
        for path, info in entry["files"].items():
            yield f"{_place(name, entry)}/{path}", info


def _write_sums(target: Path, record: dict[str, Any]) -> None:
    lines = [f"{info['sha256']}  {path}\n" for path, info in _recorded_files(record)]
    files.write_text(target / SUMS, "".join(sorted(lines, key=lambda line: line.split()[1])))


def verify(target: Path) -> None:
    """Compares a folder with its sums.

    Raises:
        UserError: names every file that is missing, unfinished or different.
    """
    if not (target / RECORD).is_file():
        raise UserError(f"{target} has no {RECORD}; it is not a download of this command.")
    record = _read_record(target)
    problems, count, total = [], 0, 0
    for path, info in _recorded_files(record):
        local = target / path
        if not info["done"]:
            problems.append(f"{path} was not downloaded")
        elif not local.is_file():
            problems.append(f"{path} is missing")
        elif local.stat().st_size != info["size"] or files.sha256_of_file(local) != info["sha256"]:
            problems.append(f"{path} differs")
        count, total = count + 1, total + (info["size"] or 0)
    if problems:
        raise UserError(
            f"{target}: {'; '.join(problems)}; copy it again, or run the download again."
        )
    print(f"{target}: {count} files, {total / 1e9:.2f} GB, all as downloaded.")


def main() -> None:
    """Parses the command line, and downloads or verifies."""
    description = "Downloads everything that a recipe needs into one folder, with checksums."
    config = parse(DownloadConfig, FLAGS, None, "python -m cosmos_posttrain.download", description)
    validate(config)
    if config.verify:
        verify(Path(config.folder))
        return
    try:
        download(config)
    except OSError as error:
        raise UserError(
            f"{config.folder} cannot be written ({error.strerror or error}); make room or name "
            "another --target, then run the same command again."
        ) from error


if __name__ == "__main__":
    run_cli(main)
