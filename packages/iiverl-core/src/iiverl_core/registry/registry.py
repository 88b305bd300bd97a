"""A registry: a table of built-in infos by name, extended by the entry points of installed packages."""

import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from iiverl_core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Info:
    """Something that a configuration can name, and the location of its code.

    `name` is its name in the YAML file, `aliases` are other names, `summary` is one line without a full stop. `code` is
    `"module:attribute"`, imported by `load`, so that an info costs nothing until it is used.
    """

    name: str
    summary: str
    code: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return self.name, *self.aliases

    def load(self) -> Any:
        """Import the code.

        Raises:
            ConfigError: something has to be installed first, or the module or the attribute does not exist.
        """
        if reason := self.missing():
            raise ConfigError(reason)
        return load_code(self.code, self.name)

    def unusable(self) -> str | None:
        """Explain why the info of another package cannot be used; None if it can."""
        return None

    def missing(self) -> str | None:
        """Explain what has to be installed before this can be used; None if nothing."""
        return None


InfoT = TypeVar("InfoT", bound=Info)


class Registry(Mapping[str, InfoT], Generic[InfoT]):
    """Infos of one kind by name and alias; iterates over names without aliases.

    Other packages add infos under an entry-point group. The value of an entry point refers to an info, which is registered
    by its own `name`. Entry points are read on first use. One that cannot be used does not affect the others: `broken` has
    the reason. `absent` are infos that are listed while no installed package provides their names.
    """

    def __init__(
        self,
        label: str,
        group: str,
        kind: type[InfoT],
        built_in: Iterable[InfoT] = (),
        *,
        absent: Iterable[InfoT] = (),
        siblings: type[Info] | None = None,
    ) -> None:
        """Create a registry; other infos of the class `siblings` in the same group belong to other registries."""
        self.label, self.group, self._kind = label, group, kind
        self._built_in, self._absent, self._siblings = tuple(built_in), tuple(absent), siblings or kind

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, name: str) -> InfoT:
        return self._by_name[name]

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._found.infos)

    def __len__(self) -> int:
        return len(self._found.infos)

    @property
    def names(self) -> tuple[str, ...]:
        """All names and aliases."""
        return tuple(self._by_name)

    @property
    def external(self) -> tuple[InfoT, ...]:
        """Infos that come from entry points."""
        return self._found.external

    @property
    def broken(self) -> Mapping[str, str]:
        """Entry points that cannot be used, with the reason."""
        return self._found.broken

    def find(self, name: str, key: str, also: str = "") -> InfoT:
        """Find an info by name; `key` is the key of the configuration, and `also` ends the list of known names.

        Raises:
            ConfigError: the name is unknown; the message lists the names and the broken entry points.
        """
        if name in self:
            return self[name]
        near = get_close_matches(name, self.names, n=1)
        broken = "".join(f"\n{entry}: {reason}" for entry, reason in self.broken.items())
        raise ConfigError(
            f"{key}: unknown {self.label} {name!r}{f'; did you mean {near[0]}?' if near else '.'} "
            f"There are {', '.join(self.names)}{also}.{broken}"
        )

    def reload(self) -> None:
        """Read the entry points again on next use, for example after installing a package."""
        for name in ("_by_name", "_found"):
            self.__dict__.pop(name, None)

    @cached_property
    def _by_name(self) -> dict[str, InfoT]:
        return {word: info for info in self._found.infos.values() for word in info.names}

    @cached_property
    def _found(self) -> "_Found[InfoT]":
        taken = {word: "iiverl" for info in self._built_in for word in info.names}
        external: list[InfoT] = []
        broken: dict[str, str] = {}
        for entry in entry_points(group=self.group):
            where = _describe(entry)
            info = _load_entry_point(entry, self._siblings)
            if isinstance(info, str):
                broken[where] = info
            elif isinstance(info, self._kind):
                if reason := info.unusable():
                    broken[where] = reason
                elif clash := next((word for word in info.names if word in taken), None):
                    broken[where] = f"the {self.label} {clash} is already defined by {taken[clash]}"
                else:
                    external.append(info)
                    taken |= dict.fromkeys(info.names, where)
        known = {info.name: info for info in (*self._built_in, *self._absent)}
        infos = known | {info.name: info for info in external}
        return _Found(infos, tuple(external), broken)


@dataclass(frozen=True)
class _Found(Generic[InfoT]):
    infos: dict[str, InfoT]
    external: tuple[InfoT, ...]
    broken: dict[str, str]


def load_code(code: str, name: str) -> Any:
    """Import `"module:attribute"`, the code of `name`.

    Raises:
        ConfigError: the module or the attribute does not exist.
    """
    module, _, attribute = code.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, but imports one that does not
        raise ConfigError(
            f"{name}: cannot import its code {code}: there is no module {error.name}"
        ) from error
    except AttributeError as error:
        raise ConfigError(f"{name}: cannot import its code {code}: {error}") from error


def _load_entry_point(entry: EntryPoint, kind: type[Info]) -> Info | str:
    """Load the info of an entry point; if that fails, return the reason."""
    try:
        info = entry.load()
    except Exception as error:
        return f"importing {entry.value} failed: {type(error).__name__}: {error}"
    if not isinstance(info, kind):
        given = "a class" if isinstance(info, type) else f"an object of {type(info).__name__}"
        return f"{entry.value} is {given}, not a {kind.__name__}"
    return info


def _describe(entry: EntryPoint) -> str:
    package = f" of {entry.dist.name}" if entry.dist else ""
    return f"entry point {entry.name}{package} ({entry.group})"
