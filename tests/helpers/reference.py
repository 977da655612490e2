"""Where the reference data lies: golden outputs of the public reference models, and sample clips.

``COSMOS_REFERENCE_DIR`` names the folder (with ``golden/`` and ``data/cosmos_samples/`` in it); the
default is ``../shared`` beside the checkout. Tests that need it are skipped where it is absent.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REFERENCE_DIR = Path(
    os.environ.get("COSMOS_REFERENCE_DIR", Path(__file__).resolve().parents[3] / "shared")
)
GOLDEN_DIR = REFERENCE_DIR / "golden"
SAMPLES_DIR = REFERENCE_DIR / "data" / "cosmos_samples"

needs_golden = pytest.mark.skipif(
    not GOLDEN_DIR.is_dir(), reason=f"no golden data at {GOLDEN_DIR} (set COSMOS_REFERENCE_DIR)"
)
needs_samples = pytest.mark.skipif(
    not SAMPLES_DIR.is_dir(), reason=f"no sample clips at {SAMPLES_DIR} (set COSMOS_REFERENCE_DIR)"
)
