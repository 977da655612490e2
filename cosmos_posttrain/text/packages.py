"""The packages of the extra ``video2world``, imported when they are first needed.

Flows in: a module's name. Flows out: the module, or one sentence on how to install it.
"""

from __future__ import annotations

import importlib
from typing import Any

from cosmos_posttrain.errors import TextError


def package(name: str) -> Any:
    """Imports ``transformers``, ``tokenizers`` or ``sentencepiece``.

    Raises:
        TextError: it is not installed, or does not work with what else is installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        raise TextError(
            f"prompts are encoded with the package {missing.partition('.')[0]}, which is not "
            "installed; run pip install '.[video2world]'."
        ) from error
    except ImportError as error:  # such as transformers beside a huggingface_hub that is too old
        first_line = str(error).strip().partition("\n")[0]
        raise TextError(
            f"the package {name} cannot be imported ({first_line.rstrip('.')}); run pip install "
            "--upgrade '.[video2world]'."
        ) from error
