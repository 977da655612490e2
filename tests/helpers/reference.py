"""Where the reference data lies: golden outputs of the public reference models, and sample clips.

Small golden cases are part of the repository (``tests/golden``, and the doctor's), so that a bare
clone proves parity. The full ones and the clips are looked for in ``COSMOS_REFERENCE_DIR`` (with
``golden/`` and ``data/cosmos_samples/`` in it; the default is ``../shared`` beside the checkout):
where they are, the parity tests run on them, too, and where not, tests of clips are skipped.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHIPPED_DIR = Path(__file__).resolve().parents[1] / "golden"
REFERENCE_DIR = Path(
    os.environ.get("COSMOS_REFERENCE_DIR", Path(__file__).resolve().parents[3] / "shared")
)
GOLDEN_DIR = REFERENCE_DIR / "golden"
SAMPLES_DIR = REFERENCE_DIR / "data" / "cosmos_samples"

needs_samples = pytest.mark.skipif(
    not SAMPLES_DIR.is_dir(), reason=f"no sample clips at {SAMPLES_DIR} (set COSMOS_REFERENCE_DIR)"
)


def golden_folders(kind: str) -> dict[str, Path]:
    """Golden cases with weights: the shipped ones by name, the full ones as ``full-NAME``.

    Args:
        kind: ``ar`` or ``tokenizer``.
    """
    folders = {}
    for prefix, root in (("", SHIPPED_DIR), ("full-", GOLDEN_DIR)):
        for weights in sorted((root / kind).glob("*/model.*")):
            folders[prefix + weights.parent.name] = weights.parent
    return folders
