"""Dataclasses to plain values for JSON, and back with every type checked. No torch.

Flows in: frozen dataclasses of scalars, tuples, dicts and one another. Flows out: dicts and lists;
or the dataclass again, or one sentence that names the field that does not fit.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

from cosmos_posttrain.errors import DatasetError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """A dataclass as dicts, lists and scalars, ready for JSON."""
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return {field.name: to_plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[T], value: Any, where: str) -> T:
    """The inverse of ``to_plain``; unknown keys are ignored, missing and mistyped ones refused.

    Raises:
        DatasetError: names ``where`` and the field.
    """
    return typing.cast(T, _read(kind, value, where, kind.__name__))


@functools.cache
def _fields_of(kind: type) -> tuple[dict[str, Any], frozenset[str]]:
    """Types of a dataclass's fields, resolved once, and the names of those without a default."""
    required = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return typing.get_type_hints(kind), frozenset(required)


@functools.cache
def _parts_of(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    return typing.get_origin(kind), typing.get_args(kind)


def _read(kind: Any, value: Any, where: str, name: str) -> Any:
    origin, arguments = _parts_of(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints, required = _fields_of(kind)
        missing = sorted(required - value.keys())
        if missing:
            raise DatasetError(f"{where} is damaged: it has no {missing[0]}.")
        return kind(**{k: _read(hints[k], v, where, k) for k, v in value.items() if k in hints})
    if origin in (typing.Union, types.UnionType):
        chosen = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _read(chosen[0], value, where, name)
    if origin is tuple and isinstance(value, list):
        return tuple(_read(arguments[0], item, where, name) for item in value)
    if origin is dict and isinstance(value, dict):
        return value
    plain = origin or kind
    if plain is float and type(value) is int:
        return float(value)
    if isinstance(plain, type) and type(value) is plain:
        return value
    raise DatasetError(f"{where} is damaged: {name} is {value!r}.")
