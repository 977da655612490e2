"""``python -m cosmos_posttrain.checkpoint.align``: which old tokens stand where a new token stands.

Flows in: the same videos prepared with the old and with the new tokenizer. Flows out: the file that
``train_general.py --embedding_init aligned --cooccurrence_path FILE`` starts from. No model is
needed, no GPU is used; docs/embedding_transfer.md has the maths.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_posttrain.cli import Flag, parse
from cosmos_posttrain.errors import ConfigError, DatasetError, OutputFolderError, run_cli


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


def align(config: AlignConfig) -> None:
    """Counts and writes the file, or finds it there already.

    Raises:
        UserError: bad settings or data; nothing was written.
    """
    from cosmos_posttrain.data.alignment import PreparedFolder, count_cooccurrence

    config.validate()
    old, new = PreparedFolder(config.old_data_path), PreparedFolder(config.new_data_path)
    record = {
        "old_data": old.manifest.fingerprint,
        "new_data": new.manifest.fingerprint,
        "split_string": config.split_string,
        "seed": config.seed,
        "max_clips": config.max_clips,
        "max_pairs": config.max_pairs,
    }
    if _is_there(Path(config.output), record, config.overwrite):
        print(f"{config.output} is there already, made from this data; nothing to do.")
        return
    sources = new.training_sources(config.split_string, config.seed)
    result = count_cooccurrence(old, new, sources, config.max_clips, config.max_pairs, record)
    result.save(Path(config.output))
    counts = result.record
    print(
        f"wrote {config.output}: {counts['num_token_pairs']:,} pairs of tokens from "
        f"{counts['num_clips']:,} clips; {counts['num_new_tokens']:,} of {result.new.id}'s "
        f"{result.new.vocab_size:,} tokens were seen, {counts['dropped_share']:.1%} of the volume "
        "was dropped."
    )


def _is_there(output: Path, record: dict[str, Any], overwrite: bool) -> bool:
    """True where the file holds this very result; False where it may be written.

    Raises:
        OutputFolderError: something else has that name.
    """
    from cosmos_posttrain.data.cooccurrence import read_header

    if output.is_dir():
        raise OutputFolderError(f"--output {output} is a folder; name a file in it.")
    if overwrite or not output.exists():
        return False
    try:
        found = read_header(output).get("record", {})
    except DatasetError:
        found = {}
    if all(found.get(key) == value for key, value in record.items()):
        return True
    raise OutputFolderError(
        f"{output} exists and was not made from this data with these settings; name another file, "
        "or give --overwrite."
    )


def main() -> None:
    """Parses the command line and counts."""
    program = "python -m cosmos_posttrain.checkpoint.align"
    align(parse(AlignConfig, FLAGS, None, program, "Aligns the tokens of two tokenizers."))


if __name__ == "__main__":
    run_cli(main)
