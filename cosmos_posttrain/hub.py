"""A Hugging Face id or a local path becomes a local path.

Flows in: ``nvidia/...`` or a path. Flows out: an existing local path. Downloads go through
``huggingface_hub`` (``HF_HOME``, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE`` work as
usual); what can go wrong becomes one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cosmos_posttrain.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def looks_like_hub_id(path: str) -> bool:
    """True for ``owner/name`` (with an optional ``@revision``) that is not an existing path."""
    if Path(path).exists() or not _HUB_ID.fullmatch(path):
        return False
    return Path(path.partition("@")[0]).suffix not in {
        ".jit",
        ".pt",
        ".mp4",
        ".json",
        ".safetensors",
    }


def split_revision(hub_id: str) -> tuple[str, str | None]:
    """``owner/name@revision`` -> name and revision; the revision is None where it is not given."""
    name, _, revision = hub_id.partition("@")
    return name, revision or None


def resolve(path: str | Path, allow_patterns: Sequence[str] | None = None) -> Path:
    """Returns a local path, downloading a Hugging Face repository where ``path`` names one.

    Args:
        path: a local file or folder, or ``owner/name[@revision]``.
        allow_patterns: the files of the repository that are needed; None means all.

    Raises:
        UserError: the path does not exist, or the repository is absent, gated or not cached while
            offline.
    """
    text = str(path)
    if Path(text).exists():
        return Path(text)
    if not looks_like_hub_id(text):
        raise UserError(
            f"{text} does not exist; give an existing path or a Hugging Face id such as "
            "nvidia/Cosmos-1.0-Autoregressive-4B."
        )
    import huggingface_hub

    name, revision = split_revision(text)
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(allow_patterns) if allow_patterns else None,
            )
        )
    except Exception as error:  # its HTTP library's own errors differ between versions
        raise explain(error, name, revision) from error


def cached(hub_id: str) -> Path | None:
    """Where a repository lies in the Hugging Face cache; None where it does not. No network."""
    import huggingface_hub

    name, revision = split_revision(hub_id)
    try:
        found = huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True)
    except Exception:  # its errors differ between versions; all mean that it is not there
        return None
    return Path(found)


def explain(error: Exception, name: str, revision: str | None) -> UserError:
    """What went wrong with a repository, and what to do about it, in one sentence."""
    from huggingface_hub import errors

    causes = [error, error.__cause__, error.__context__]

    def is_a(kind: type[BaseException]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    # A gated repository is also one that was not found, so the order matters.
    if is_a(errors.GatedRepoError):
        return UserError(
            f"{name} is gated; accept its licence on its Hugging Face page, then set HF_TOKEN."
        )
    if is_a(errors.RevisionNotFoundError):
        return UserError(f"{name} has no revision {revision!r}; check the name.")
    if is_a(errors.RepositoryNotFoundError):
        return UserError(
            f"{name} is neither a local path nor a Hugging Face repository that you may read; "
            "check the spelling, or set HF_TOKEN."
        )
    if is_a(errors.OfflineModeIsEnabled) or is_a(errors.LocalEntryNotFoundError):
        return UserError(
            f"{name} is not a local path and not in the Hugging Face cache, and the hub cannot be "
            "reached (offline, or no network); download it where there is a network (python -m "
            "cosmos_posttrain.download), then set HF_HOME or give its folder."
        )
    return UserError(
        f"{name} could not be downloaded ({type(error).__name__}); check the network, or give a "
        "local folder."
    )
