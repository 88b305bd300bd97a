"""Describe the values that a key accepts, and the value that it has, for messages and documentation."""

import types
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from iiverl_core.config.sections.choices import OneOf

PLAIN = {bool: "true or false", str: "a string", dict: "a section of keys and values", types.NoneType: "null", Any: "any value"}  # fmt: skip


def expected(field: FieldInfo) -> str:
    """Describe what a field accepts: `a whole number of at least 1`."""
    return either(_alternatives(field.annotation, field.metadata))


def shown(value: Any) -> str:
    """Write a value as in a YAML file, shortened to 60 characters."""
    text = _shown(value)
    return text if len(text) <= 60 else text[:57] + "…"


def choices(field: FieldInfo) -> list[str]:
    """List the words that a field accepts; empty if it accepts other values."""
    return _choices(field.annotation, field.metadata)


def _choices(kind: Any, metadata: Iterable[Any]) -> list[str]:
    if one_of := next((m for m in metadata if isinstance(m, OneOf)), None):
        return list(one_of.names)
    if get_origin(kind) is Literal:
        return [choice for choice in get_args(kind) if isinstance(choice, str)]
    parts, more = (
        (kind.__args__, kind.__metadata__) if get_origin(kind) is Annotated else (get_args(kind), ())
    )
    return [choice for part in parts for choice in _choices(part, more)]


def _alternatives(kind: Any, metadata: list[Any]) -> list[str]:
    origin, args = get_origin(kind), get_args(kind)
    if one_of := next((m for m in metadata if isinstance(m, OneOf)), None):
        return one_of.alternatives
    if origin is Annotated:
        return _alternatives(args[0], [*metadata, *args[1:]])
    if origin in (Union, types.UnionType):
        return [words for arg in args for words in _alternatives(arg, metadata)]
    if origin is Literal:
        return [_shown(arg) if not isinstance(arg, str) else arg for arg in args]
    return [_expected(kind, metadata)]


def _expected(kind: Any, metadata: list[Any]) -> str:
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple and args[-1] is Ellipsis:
        item = either(_alternatives(args[0], []))
        return f"{item}, or a list of {'strings' if item == 'a string' else 'these'}"
    if origin is tuple:
        return f"a list of {len(args)}, each {either(_alternatives(args[0], []))}"
    if kind in (int, float):
        return ("a whole number" if kind is int else "a number") + _bounds(metadata)
    return PLAIN[origin or kind]


def either(words: list[str]) -> str:
    """Join alternatives: `a, b or c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _bounds(metadata: list[Any]) -> str:
    flat = [part for m in metadata for part in (m.metadata if isinstance(m, FieldInfo) else [m])]
    low = [f"at least {m.ge}" for m in flat if isinstance(m, Ge)] + [
        f"above {m.gt}" for m in flat if isinstance(m, Gt)
    ]
    high = [f"at most {m.le}" for m in flat if isinstance(m, Le)] + [
        f"below {m.lt}" for m in flat if isinstance(m, Lt)
    ]
    words = " and ".join([*low, *high])
    return f" of {words}" if words.startswith("at") else f" {words}" if words else ""


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_shown(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    return repr(value)
