"""Resolve references: `${section.key}` in a value is replaced by the value of that key."""

import re
from collections.abc import Mapping
from typing import Any

REFERENCE = re.compile(r"(\\?)\$\{([^{}]*)\}")


class UnresolvedError(Exception):
    """A reference to no key, or a circular one; `paths` are the keys whose values contain it."""

    def __init__(self, message: str, paths: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.paths = paths


def references(value: Any) -> set[str]:
    """Return the keys that a value refers to, including those nested in lists and mappings."""
    if isinstance(value, Mapping):
        return set().union(*(references(item) for item in value.values()))
    if isinstance(value, list | tuple):
        return set().union(*(references(item) for item in value))
    return {m[2].strip() for m in REFERENCE.finditer(value) if not m[1]} if isinstance(value, str) else set()


def reference(value: Any) -> str | None:
    """Return the key that a value is a reference to; None if the value is anything else."""
    match = REFERENCE.fullmatch(value) if isinstance(value, str) else None
    return match[2].strip() if match and not match[1] else None


class Interpolation:
    """Resolves the references in `values`, a mapping from full paths to values.

    A value that consists of a reference gets the other value with its type; with text around it, it becomes a string.
    `\\${` is an escaped `${`.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.done: dict[str, Any] = {}
        self.open: list[str] = []

    def get(self, path: str) -> Any:
        """Return the value at `path` with all references resolved.

        Raises:
            UnresolvedError: a reference is to no key, or circular.
        """
        if path in self.done:
            return self.done[path]
        if path in self.open:
            circle = self.open[self.open.index(path) :]
            chain = " → ".join([*circle, path])
            raise UnresolvedError(f"circular reference: {chain}", tuple(circle))
        self.open.append(path)
        try:
            self.done[path] = self.resolve(self.values[path])
        except UnresolvedError as error:
            error.paths = error.paths or (path,)
            raise
        finally:
            self.open.pop()
        return self.done[path]

    def resolve(self, value: Any) -> Any:
        """Resolve the references in a value, including those nested in lists and mappings."""
        if isinstance(value, Mapping):
            return {key: self.resolve(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.resolve(item) for item in value)
        if not isinstance(value, str):
            return value
        whole = reference(value)
        if whole is not None:
            return self.target(whole)
        return REFERENCE.sub(lambda m: m[0][1:] if m[1] else self.text(m[2].strip()), value)

    def text(self, path: str) -> str:
        """Return the value of a key as text within a string."""
        target = self.target(path)
        return "" if target is None else str(target)

    def target(self, path: str) -> Any:
        """Return the value, or the section, that a reference names."""
        if path in self.values:
            return self.get(path)
        below = [key for key in self.values if key.startswith(path + ".")]
        if below:
            return nested({key.removeprefix(path + "."): self.get(key) for key in below})
        holder = path
        while "." in holder:  # a key inside a value that is itself a mapping
            holder = holder.rpartition(".")[0]
            if holder in self.values:
                return _descend(self.get(holder), path.removeprefix(holder + ".").split("."), path)
        raise UnresolvedError(_no_such_key(path))


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn full paths into nested sections."""
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *parents, name = path.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        section[name] = value
    return tree


def _descend(value: Any, names: list[str], path: str) -> Any:
    for name in names:
        if not isinstance(value, Mapping) or name not in value:
            raise UnresolvedError(_no_such_key(path))
        value = value[name]
    return value


def _no_such_key(path: str) -> str:
    if path.startswith("."):
        return f"${{{path}}} is relative, which is not supported; write the full path of the key"
    if ":" in path:
        return f"${{{path}}} calls a resolver, which is not supported; only keys of this configuration can be referenced"
    return f"${{{path}}} is not a key of this configuration"
