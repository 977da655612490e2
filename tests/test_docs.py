"""The documents name flags that exist, and every flag says what it is for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

import pytest
from helpers.distributed_run import REPOSITORY_DIR, run_script

PACKAGE = "cosmos_posttrain"
COMMANDS = (
    *((path.name,) for path in sorted(REPOSITORY_DIR.glob("*.py"))),
    *(
        ("-m", f"{PACKAGE}.{path.parent.name}")
        for path in sorted(REPOSITORY_DIR.glob(f"{PACKAGE}/*/__main__.py"))
    ),
    *(("-m", f"{PACKAGE}.{name}") for name in ("doctor", "download")),
)
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "recipes/*.sh", "configs/*.yaml")
    for path in REPOSITORY_DIR.glob(pattern)
)
# Of other people's commands, of benchmarks, and of the recipes' own helpers.
OTHERS = {
    *"--standalone --nproc-per-node --nnodes --rdzv-backend --rdzv-endpoint --rdzv-id".split(),
    *"--build-arg --gpus --shm-size --ipc --rm --no-deps --index-url --constraint".split(),
    *"--editable --upgrade --check --signal --max-restarts --from-env-file".split(),
    *"--first --video --figure --num_tokens --prompt_tokens --runs --threads --case".split(),
    *"--run --input_dir --split --world --choose --picture --base --rows".split(),
    *"--shape --peers --batch --clock --windows --modules --clips --heads".split(),
    *"--logdir --samples_per_plugin --timed_clips --given_latents --size --steps".split(),
    *"--warmup --work_dir --compile --prompts --preset --trace".split(),
}
# Not the arrows of drawings (a --room--> b), and not `--offload_*`.
FLAG = r"(?<![\w-])--[a-z]\w*(?:-\w+)*(?![\w*-])"


@cache
def help_text(command: tuple[str, ...]) -> str:
    finished = run_script([*command, "--help"], timeout_seconds=60)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def help_texts(command: tuple[str, ...]) -> Iterator[str]:
    """The help of a command, or of each of its subcommands."""
    text = help_text(command)
    names = re.findall(r"^  (\w+)  ", text.partition("\ncommands:")[2], re.M)
    yield from (help_text((*command, name)) for name in names) if names else [text]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_flag_says_what_it_is_for(command: tuple[str, ...]) -> None:
    for text in help_texts(command):
        found = re.findall(r"^  (--?\w.*(?:\n {3,}.*)*)", text.partition("options:")[2], re.M)
        assert len(found) >= 3, text
        for entry in found:
            name, *words = re.split(r" {2,}", re.sub(r"\n +", "  ", entry), maxsplit=1)
            assert words and re.search(r"[a-z]{3}", words[0]), f"{name} has no text"


def test_documents_name_flags_that_exist() -> None:
    known = set(OTHERS)
    for command in COMMANDS:
        for text in help_texts(command):
            known |= set(re.findall(FLAG, text))
    unknown = {
        (path.name, flag)
        for path in DOCUMENTS
        for flag in re.findall(FLAG, path.read_text(encoding="utf-8"))
        if flag not in known
    }
    assert unknown == set()
