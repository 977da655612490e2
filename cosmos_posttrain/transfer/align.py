"""Which old tokens stand where a new token stands: counts them and writes the file.

Flows in: the same videos prepared with the old and with the new tokenizer. Flows out: the file that
``train_general.py --embedding_init aligned --cooccurrence_path FILE`` starts from. No model is
needed, no GPU is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cosmos_posttrain.errors import DatasetError, OutputFolderError
from cosmos_posttrain.files import check_writable
from cosmos_posttrain.transfer.config import AlignConfig, validate


def align(config: AlignConfig) -> None:
    """Counts and writes the file, or finds it there already.

    Raises:
        UserError: bad settings or data; nothing was written.
    """
    from cosmos_posttrain.transfer.counting import PreparedFolder, count_cooccurrence

    validate(config)
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
    from cosmos_posttrain.transfer.cooccurrence import read_header

    if output.is_dir():
        raise OutputFolderError(f"--output {output} is a folder; name a file in it.")
    if overwrite or not output.exists():
        check_writable(output.parent, "the folder of --output")
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
