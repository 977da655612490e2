"""Settings and flags of ``python -m cosmos_posttrain.transfer``. No torch.

Flows in: the command line. Flows out: an ``AlignConfig``.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.cli import Flag
from cosmos_posttrain.errors import ConfigError


@dataclass
class AlignConfig:
    """Settings of the command.

    Attributes:
        old_data_path: folder prepared with the tokenizer that the model was trained on.
        new_data_path: folder prepared from the same videos with the new tokenizer.
        output: the file to write.
        split_string: shares of train, validation and test; only training videos are used. Give what
            training is given.
        seed: of the split, likewise.
        max_clips: largest number of new clips to look at.
        max_pairs: largest number of token pairs to keep; 16 bytes each, and three times that while
            they are summed.
        overwrite: replace an existing file.
    """

    old_data_path: str = ""
    new_data_path: str = ""
    output: str = ""
    split_string: str = "98,1,1"
    seed: int = 1234
    max_clips: int = 20000
    max_pairs: int = 20_000_000
    overwrite: bool = False

    def validate(self) -> None:
        """Lists every problem at once.

        Raises:
            ConfigError: one sentence with all of them.
        """
        problems = [
            f"--{name} is missing"
            for name in ("old_data_path", "new_data_path", "output")
            if not getattr(self, name)
        ]
        problems += [
            f"--{name} {getattr(self, name)} must be at least 1"
            for name in ("max_clips", "max_pairs")
            if getattr(self, name) < 1
        ]
        if problems:
            raise ConfigError("; ".join(problems) + ".")


FLAGS = (
    Flag("--old_data_path", "old_data_path", "data prepared with the model's tokenizer"),
    Flag("--new_data_path", "new_data_path", "the same videos prepared with the new tokenizer"),
    Flag("--output", "output", "file to write, such as cooccurrence.safetensors"),
    Flag("--split_string", "split_string", "shares of train,validation,test, as in training"),
    Flag("--seed", "seed", "of the split, as in training"),
    Flag("--max_clips", "max_clips", "new clips to look at, spread over the training videos"),
    Flag("--max_pairs", "max_pairs", "token pairs to keep; the lightest are dropped beyond it"),
    Flag("--overwrite", "overwrite", "replace an existing file"),
)
