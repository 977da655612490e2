"""Typed configuration: defaults < YAML < flags and overrides, merged by OmegaConf.

Flows in: a dataclass (each task's config lives beside its code, with every field documented), an
optional YAML file and dotted overrides. Flows out: an instance of that dataclass, checked field by
field, or one sentence that says which key does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from cosmos_posttrain.errors import ConfigError

T = TypeVar("T")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]


def merge(
    config_class: type[T],
    config_file: str | Path | None = None,
    overrides: Sequence[tuple[str, Any]] = (),
    dotlist: Sequence[str] = (),
) -> T:
    """Builds a config from its defaults, a YAML file, (key, value) overrides and ``key=value``s.

    Args:
        config_class: a dataclass whose defaults are the starting point.
        config_file: YAML with the same keys; it may leave any of them out.
        overrides: dotted keys with values, applied after the file.
        dotlist: ``key=value`` strings, applied last; values are read as YAML.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or a file that cannot be read.
    """
    tree = OmegaConf.structured(config_class)
    try:
        if config_file is not None:
            if not Path(config_file).is_file():
                raise ConfigError(f"--config {config_file} does not exist; name a YAML file.")
            tree = OmegaConf.merge(tree, OmegaConf.load(config_file))
        for key, value in overrides:
            OmegaConf.update(tree, key, value, merge=False)
        for item in dotlist:
            if "=" not in item:
                raise ConfigError(f"{item!r} is neither a flag nor an override; write key=value.")
        if dotlist:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(list(dotlist)))
        return cast(T, OmegaConf.to_object(tree))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ConfigError(f"the configuration does not fit: {_first_line(error)}.") from error


def to_dict(config: object) -> dict[str, Any]:
    """The config as plain dicts, lists and scalars."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def to_yaml(config: object) -> str:
    """The resolved config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
