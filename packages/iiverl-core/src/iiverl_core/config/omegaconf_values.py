"""Values of a YAML file of Hydra's, whose references are resolved as OmegaConf does.

A reference to a key that is known here stays one. Others are replaced by what they refer to: `${.name}`, from the section
that contains it, `${oc.select:key,default}` and `${oc.env:NAME,default}`.
"""

import os
import re
from collections.abc import Container, Mapping
from typing import Any

from iiverl_core.config.yaml_reader import Unreadable, read_yaml

_REFERENCE = re.compile(r"\$\{([^{}]*)\}")
_RESOLVER = re.compile(r"oc\.(select|env):\s*([^,]*?)\s*(?:,(.*))?", re.DOTALL)
MISSING = "???"  # a value that has to be given elsewhere


def resolved(values: Mapping[str, Any], known: Container[str]) -> dict[str, Any]:
    """Return the values of a file with its references resolved; `known` are the keys to which references may stay.

    Values that are missing, and those that refer to a section or to nothing, are left out.
    """
    return _Resolver(values, known).section(values, ())


class _Resolver:
    """Resolves the references of one file."""

    def __init__(self, values: Mapping[str, Any], known: Container[str]) -> None:
        self.values, self.known = values, known
        self.open: set[str] = set()

    def section(self, values: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
        """Resolve the values of a section."""
        found = {}
        for name, value in values.items():
            if isinstance(value, Mapping):
                found[name] = self.section(value, (*path, name))
            elif isinstance(value, Unreadable) or not isinstance(value, str):
                found[name] = value
            elif value != MISSING and (given := self.text(value, path)) is not MISSING:
                found[name] = given
        return found

    def text(self, value: str, path: tuple[str, ...]) -> Any:
        """Resolve the references in a text of the section at `path`; `MISSING` if it has no value."""
        whole = _REFERENCE.fullmatch(value)
        if whole:
            return self.reference(whole[1], path)
        parts = [self.reference(match[1], path) for match in _REFERENCE.finditer(value)]
        if any(part is MISSING for part in parts):
            return MISSING
        given = iter(parts)
        return _REFERENCE.sub(lambda _: str(next(given)), value)

    def reference(self, inner: str, path: tuple[str, ...]) -> Any:
        """Return what the inner part of a reference stands for, or the reference itself if it may stay."""
        resolver = _RESOLVER.fullmatch(inner.strip())
        if resolver is None:
            key = _absolute(inner.strip(), path)
            return f"${{{key}}}" if key in self.known else self.at(key)
        kind, name, default = resolver.groups()
        given = os.environ.get(name, MISSING) if kind == "env" else self.at(_absolute(name, path))
        if given is not MISSING and not (given is None and kind == "select"):
            return given
        return MISSING if default is None else read_yaml(default.strip(), "").values

    def at(self, key: str) -> Any:
        """Return the value of a key of the file; `MISSING` if it has none, or is a section."""
        value: Any = self.values
        *parents, _ = names = key.split(".")
        for name in names:
            if not isinstance(value, Mapping) or name not in value:
                return MISSING
            value = value[name]
        if isinstance(value, Mapping) or value == MISSING or key in self.open:
            return MISSING
        if not isinstance(value, str):
            return value
        self.open.add(key)
        try:
            given = self.text(value, tuple(parents))
        finally:
            self.open.discard(key)
        whole = _REFERENCE.fullmatch(given) if isinstance(given, str) else None
        return self.at(whole[1]) if whole and whole[1] != key else given


def _absolute(key: str, path: tuple[str, ...]) -> str:
    """Return the full path of a key, of which one that begins with dots is relative to a section."""
    names = key.lstrip(".")
    dots = len(key) - len(names)
    return ".".join([*path[: len(path) + 1 - dots], names]) if dots else key
