"""What an alignment is: its settings, flags and checks. No torch.

Flows in: defaults < YAML < flags < overrides (``cli.py``). Flows out: an ``AlignConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting

# Kinds of --embedding_init that start from the file.
COOCCURRENCE_INITS = ("aligned", "omp")


@dataclass
class AlignConfig:
    """Settings of ``python -m cosmos_posttrain.transfer``.

    Attributes:
        old_data_path: folder prepared with the tokenizer that the model was trained on.
        new_data_path: folder prepared from the same videos with the new tokenizer.
        output: file to write, such as cooccurrence.safetensors.
        split_string: shares of train, validation and test, as in training; only training videos are
            used.
        seed: of the split, as in training.
        max_clips: new clips to look at, spread over the training videos.
        max_pairs: token pairs to keep, the lightest are dropped beyond it; 16 bytes each, and three
            times that while they are summed.
        overwrite: replace an existing file.
    """

    old_data_path: str = ""
    new_data_path: str = ""
    output: str = ""
    split_string: str = "98,1,1"
    seed: int = 1234
    max_clips: int = setting(20000, at_least=1)
    max_pairs: int = setting(20_000_000, at_least=1)
    overwrite: bool = False


FLAGS = (
    Flag("--old_data_path"),
    Flag("--new_data_path"),
    Flag("--output"),
    Flag("--split_string"),
    Flag("--seed"),
    Flag("--max_clips"),
    Flag("--max_pairs"),
    Flag("--overwrite"),
)


def validate(config: AlignConfig) -> None:
    """Lists every problem of a config at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    needed = ("old_data_path", "new_data_path", "output")
    problems = [f"--{name} is missing" for name in needed if not getattr(config, name)]
    check(config, flag_names(FLAGS), problems)
