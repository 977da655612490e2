"""Settings and flags of ``python -m cosmos_posttrain.data``. No torch.

Flows in: the command line. Flows out: the config of one of its commands.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos_posttrain.cli import Flag, flag_names
from cosmos_posttrain.config import check, setting

SPLITS = ("train", "validation", "test")


@dataclass
class InfoConfig:
    """Settings of ``info``.

    Attributes:
        data_path: a folder that prepare_dataset.py wrote, or data of the original recipe.
    """

    data_path: str = ""


@dataclass
class ExportConfig:
    """Settings of ``export``.

    Attributes:
        data_path: a folder that prepare_dataset.py imported.
        output_dir: new folder for the files as they were before the import.
    """

    data_path: str = ""
    output_dir: str = ""


@dataclass
class VerifyConfig:
    """Settings of ``verify``.

    Attributes:
        data_path: a folder that prepare_dataset.py wrote.
        num_workers: files that are read at the same time.
    """

    data_path: str = ""
    num_workers: int = setting(4, at_least=1)


INFO_FLAGS = (Flag("--data_path"),)
EXPORT_FLAGS = (Flag("--data_path"), Flag("--output_dir"))
VERIFY_FLAGS = (Flag("--data_path"), Flag("--num_workers"))


def validate(config: InfoConfig | VerifyConfig | ExportConfig) -> None:
    """Lists every problem at once; changes nothing.

    Raises:
        ConfigError: one sentence with all of them.
    """
    problems = []
    if not config.data_path:
        problems.append("--data_path is missing: name the folder that prepare_dataset.py wrote")
    if isinstance(config, ExportConfig) and not config.output_dir:
        problems.append("--output_dir is missing: name a new folder")
    check(config, flag_names(VERIFY_FLAGS), problems)
