"""The command line of the service: ``python -m cosmos_posttrain.serve``; see docs/serve.md."""

from __future__ import annotations

from importlib.util import find_spec

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
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(f"the service needs {', '.join(missing)}; run pip install '.[serve]'.")
    from cosmos_posttrain.serve.server import run

    run(config)


if __name__ == "__main__":
    run_cli(main)
