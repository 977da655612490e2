"""The Hugging Face hub itself, through huggingface_hub; ``test_download.py`` has one of its own.

Each test runs in processes with a cache of their own, because the others are kept offline.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
from helpers.distributed_run import run_script

pytestmark = pytest.mark.network

T5 = "google-t5/t5-11b"  # public, of this package's own recipes; only its config is fetched
TINY_T5 = "hf-internal-testing/tiny-random-t5"  # public, a few megabytes

RESOLVE = """
import sys
from cosmos_posttrain.hub import resolve
from cosmos_posttrain.launch import run_cli
run_cli(lambda: print(resolve(sys.argv[1], sys.argv[2:])))
"""
LOOK_UP = """
import json
from cosmos_posttrain import download
from cosmos_posttrain.hub import split_revision
found = {}
for recipe in download.RECIPES:
    for hub_id, role in download.wanted(download.DownloadConfig("unused", recipe=recipe)).items():
        files = download._look_up(*split_revision(hub_id), role)["files"]
        found[hub_id] = [role, list(files)]
print(json.dumps(found))
"""


def run(home: Path, *words: str | Path, offline: bool = False) -> subprocess.CompletedProcess[str]:
    env = {
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return run_script(words, env=env)


def resolve(home: Path, *words: str, offline: bool = False) -> Path:
    finished = run(home, "-c", RESOLVE, *words, offline=offline)
    assert finished.returncode == 0, finished.stderr
    return Path(finished.stdout.splitlines()[-1])


def test_only_what_is_asked_for_is_fetched_and_stays(tmp_path: Path) -> None:
    folder = resolve(tmp_path, T5, "config.json")
    assert [path.name for path in folder.rglob("*")] == ["config.json"]
    assert json.loads((folder / "config.json").read_text())["d_model"] == 1024
    assert re.fullmatch("[0-9a-f]{40}", folder.name)  # the commit
    assert resolve(tmp_path, f"{T5}@{folder.name}", "config.json") == folder
    assert resolve(tmp_path, T5, "config.json", offline=True) == folder


@pytest.mark.parametrize(
    ("hub_id", "offline", "words"),
    [
        (f"{T5}@no-such-revision", False, "has no revision 'no-such-revision'"),
        ("google-t5/no-such-model-of-theirs", False, "neither a local path nor a Hugging Face"),
        (T5, True, "not in the Hugging Face cache"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(
    tmp_path: Path, hub_id: str, offline: bool, words: str
) -> None:
    finished = run(tmp_path, "-c", RESOLVE, hub_id, "config.json", offline=offline)
    assert finished.returncode == 2
    assert words in finished.stderr and finished.stderr.count("\n") == 1


def test_the_repositories_of_all_recipes_hold_what_is_read(tmp_path: Path) -> None:
    """Their lists of files are public, also where the files are gated; nothing is fetched."""
    finished = run(tmp_path, "-c", LOOK_UP)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    assert len(found) == 7  # four models, two tokenizers, a text encoder
    for hub_id, (role, files) in found.items():
        assert len(files) >= 2, f"{hub_id}, {role}: {files}"


def test_a_download_is_complete_and_verified(tmp_path: Path) -> None:
    command = ["-m", "cosmos_posttrain.download", "--target", tmp_path / "all"]
    finished = run(tmp_path / "home", *command, "--text_encoder", TINY_T5)
    assert finished.returncode == 0, finished.stderr
    folder = tmp_path / "all"
    assert (folder / TINY_T5 / "config.json").is_file()
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=folder, check=True)
    finished = run(tmp_path / "home", *command, "--verify", offline=True)
    assert finished.returncode == 0, finished.stderr
