"""The README's commands: every flag and config file in them must exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

import pytest

from cosmos_posttrain.cli import Flag, parse
from cosmos_posttrain.config import merge
from cosmos_posttrain.evaluation.commands import COMMANDS
from cosmos_posttrain.inference.config import FLAGS as INFER_FLAGS
from cosmos_posttrain.inference.config import InferConfig
from cosmos_posttrain.prepare.config import FLAGS as PREPARE_FLAGS
from cosmos_posttrain.prepare.config import PrepareConfig
from cosmos_posttrain.training.config import FLAGS as TRAIN_FLAGS
from cosmos_posttrain.training.config import TrainConfig

REPOSITORY = Path(__file__).resolve().parents[1]
SCRIPTS: dict[str, tuple[type, Sequence[Flag]]] = {
    "prepare_dataset.py": (PrepareConfig, PREPARE_FLAGS),
    "train_general.py": (TrainConfig, TRAIN_FLAGS),
    "infer.py": (InferConfig, INFER_FLAGS),
}
EVALUATIONS: dict[str, tuple[type, Sequence[Flag]]] = {
    f"evaluate.py {name}": (command.config_class, command.flags)
    for name, command in COMMANDS.items()
}


def readme_commands() -> list[tuple[str, list[str]]]:
    """(script, arguments) of every call of one of our scripts, with variables filled in."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
    values = dict(re.findall(r'export (\w+)="?([^"\n#]*?)"?(?:\s+#.*)?$', code, re.M))
    code = re.sub(r"\$(\w+)", lambda match: values[match[1]], code)
    commands = []
    for line in code.splitlines():
        words = shlex.split(line, comments=True)
        if "evaluate.py" in words:
            start = words.index("evaluate.py")
            commands.append((" ".join(words[start : start + 2]), words[start + 2 :]))
        for script in SCRIPTS:
            if script in words:
                commands.append((script, words[words.index(script) + 1 :]))
    return commands


def test_readme_shows_the_whole_tutorial() -> None:
    evaluations = [f"evaluate.py {name}" for name in ("loss", "generate", "report")]
    assert [script for script, _ in readme_commands()] == [*SCRIPTS, *evaluations]


@pytest.mark.parametrize(("script", "arguments"), readme_commands())
def test_readme_command_parses(script: str, arguments: list[str]) -> None:
    config_class, flags = {**SCRIPTS, **EVALUATIONS}[script]
    config: object = parse(config_class, flags, arguments, script, "")
    assert config != config_class()


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs").glob("*.yaml")), ids=str)
def test_shipped_configs_load(path: Path) -> None:
    if path.name.startswith("prepare"):
        merge(PrepareConfig, path)
    elif path.name.startswith("train"):
        merge(TrainConfig, path)
    else:
        from cosmos_posttrain.tokenizer_training.config import TokenizerTrainConfig

        merge(TokenizerTrainConfig, path)
