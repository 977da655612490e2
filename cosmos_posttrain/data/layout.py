"""Names of the files in a prepared folder. No torch.

Flows in: names and numbers. Flows out: what is ours, and how shards are called.
"""

from __future__ import annotations

import re

MANIFEST_FILE = "manifest.json"
FAILURES_FILE = "failures.jsonl"
SOURCES_FILE = "sources.npz"
PLAN_FILE = "prepare.json"  # what a run that is not complete is about
EXTENSIONS = ("bin", "idx", "jsonl")  # of a shard's files
# Beside them, of robot data: what belongs to every frame, and the segment that it came from.
STATES_EXTENSION, SEGMENTS_EXTENSION = "states", "segments"
PROMPTS_PER_SHARD = 1024  # in each prompt shard but the last

_OURS = re.compile(
    r"manifest\.json|failures\.jsonl|prepare\.json|sources\.npz"
    r"|(shard|prompts)-\d{5,}\.(bin|idx|jsonl|json)|shard-\d{5,}\.(states|segments)"
)


def shard_name(number: int) -> str:
    """``shard-00000`` and so on."""
    return f"shard-{number:05d}"


def prompt_shard_name(number: int) -> str:
    """``prompts-00000`` and so on."""
    return f"prompts-{number:05d}"


def is_ours(name: str) -> bool:
    """True for the names that preparation writes, and for no other."""
    return _OURS.fullmatch(name) is not None
