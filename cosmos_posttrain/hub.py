"""A Hugging Face id or a local path becomes a local path.

Flows in: ``nvidia/...`` or a path. Flows out: an existing local path. Downloads go through
``huggingface_hub`` (``HF_HOME``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` work as usual).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cosmos_posttrain.errors import UserError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w.-]+)?")


def looks_like_hub_id(path: str) -> bool:
    """True for ``owner/name`` (with an optional ``@revision``) that is not an existing path."""
    if Path(path).exists() or not _HUB_ID.fullmatch(path):
        return False
    return Path(path).suffix not in {".jit", ".pt", ".mp4", ".json", ".safetensors"}


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
    return _download(text, allow_patterns)


def _download(hub_id: str, allow_patterns: Sequence[str] | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    name, _, revision = hub_id.partition("@")
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=list(allow_patterns) if allow_patterns else None,
            )
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} is gated; accept its licence on its Hugging Face page, then set HF_TOKEN."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision!r}; check the name.") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{name} is neither a local path nor a Hugging Face repository that you may read; "
            "check the spelling, or set HF_TOKEN."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{name} is not a local path and not in the Hugging Face cache, and the hub cannot be "
            "reached; download it where there is a network, then set HF_HOME or give its folder."
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{name} could not be downloaded ({type(error).__name__}); check the network, or give "
            "a local folder."
        ) from error
