"""The keys and sections of the configuration, read from its classes."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

from pydantic.fields import FieldInfo

from iiverl_core.config.sections.root import Config
from iiverl_core.config.sections.section import NoEffect, NotYet, OnlyWhen, Section


@dataclass(frozen=True)
class Key:
    """A key that has a value: its full path, its field, and its marks after those of the sections that contain it."""

    path: str
    field: FieldInfo
    marks: tuple[NoEffect | NotYet | OnlyWhen, ...]

    @property
    def default(self) -> Any:
        """The default as written in its class; a string with `${…}` refers to another key."""
        return self.field.get_default(call_default_factory=True)

    @property
    def description(self) -> str:
        """One line about what the key does."""
        return " ".join((self.field.description or "").split())


@cache
def keys() -> MappingProxyType[str, Key]:
    """Return all keys that have a value, by path, in the order of their classes."""
    return MappingProxyType({key.path: key for key in _keys(Config, "", ())})


@cache
def sections() -> MappingProxyType[str, type[Section]]:
    """Return all sections by path; the whole configuration has the empty path."""
    return MappingProxyType(dict(_sections(Config, "")))


def join(section: str, name: str) -> str:
    """Return the path of a key in a section."""
    return f"{section}.{name}" if section else name


def shared_sections(left: str, right: str) -> int:
    """Count the leading sections that two paths have in common."""
    pairs = zip(left.split(".")[:-1], right.split(".")[:-1], strict=False)
    return next(
        (depth for depth, (a, b) in enumerate(pairs) if a != b), min(left.count("."), right.count("."))
    )


def subsection(field: FieldInfo) -> type[Section] | None:
    """Return the class of the section that a field contains; None if it contains a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _marks(field: FieldInfo) -> tuple[NoEffect | NotYet | OnlyWhen, ...]:
    return tuple(m for m in field.metadata if isinstance(m, NoEffect | NotYet | OnlyWhen))


def _keys(section: type[Section], path: str, marks: tuple[Any, ...]) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        all_marks = (*marks, *_marks(field))
        below = subsection(field)
        if below:
            yield from _keys(below, join(path, name), all_marks)
        else:
            yield Key(join(path, name), field, all_marks)


def _sections(section: type[Section], path: str) -> Iterator[tuple[str, type[Section]]]:
    yield path, section
    for name, field in section.model_fields.items():
        below = subsection(field)
        if below:
            yield from _sections(below, join(path, name))
