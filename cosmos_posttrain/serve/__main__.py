"""The command line of the service: ``python -m cosmos_posttrain.serve``; see docs/serve.md."""

from __future__ import annotations

import importlib

from cosmos_posttrain.cli import parse
from cosmos_posttrain.errors import ConfigError
from cosmos_posttrain.launch import run_cli
from cosmos_posttrain.serve.config import FLAGS, ServeConfig, validate

_PACKAGES = ("fastapi", "uvicorn", "python_multipart")


def main() -> None:
    """Parses the command line and serves."""
    config = parse(
        ServeConfig,
        FLAGS,
        None,
        "python -m cosmos_posttrain.serve",
        "Serves a model: a page, and an HTTP interface, that take images and clips.",
    )
    validate(config)
    _check_packages()
    from cosmos_posttrain.serve.server import run

    run(config)


def _check_packages() -> None:
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"the service needs the package {name}; run pip install '.[serve]'."
            ) from error


if __name__ == "__main__":
    run_cli(main)
