"""Lays values over the defaults, resolves references, and validates the whole, with defaults for what is broken."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from iiverl_core.config.describe import choices, expected, shown
from iiverl_core.config.interpolation import Interpolation, UnresolvedError, nested, reference, references
from iiverl_core.config.problems import Problem
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.root import Config
from iiverl_core.config.suggest import nearest
from iiverl_core.config.user_values import UserValues


@dataclass(frozen=True)
class Resolved:
    """A valid configuration, and what was wrong with the values.

    `replaced` are keys whose defaults stand in for what the user set, `invalid_keys` all whose values say nothing.
    """

    config: Config
    problems: list[Problem]
    replaced: frozenset[str]
    invalid_keys: frozenset[str]


def resolve(given: UserValues, by_backend: Mapping[str, Any]) -> Resolved:
    """Make the configuration of what the user gave; `by_backend` holds the backend's own defaults."""
    resolver = _Resolver(given, by_backend)
    config = resolver.run()
    return Resolved(
        config, resolver.problems, frozenset(resolver.broken - resolver.own), resolver.invalid_keys()
    )


class _Resolver:
    """The values as they are written, and which of them turn out to be broken."""

    def __init__(self, given: UserValues, by_backend: Mapping[str, Any]) -> None:
        self.given = given
        self.defaults = {path: by_backend.get(path, key.default) for path, key in keys().items()}
        followed = {p for p, v in given.values.items() if v is None and self._null_follows(p)}
        self.written = {**self.defaults, **{p: v for p, v in given.values.items() if p not in followed}}
        self.raw = dict(self.written)
        self.own = given.values.keys() - followed
        """Keys that still have the value that the user gave."""
        self.problems: list[Problem] = []
        self.broken = set(given.broken)

    def _null_follows(self, path: str) -> bool:
        """Whether null stands for the default, which is another key's value; not where that could never be null."""
        followed = reference(self.defaults[path])
        return followed is not None and (_takes_null(followed) or not _takes_null(path))

    def run(self) -> Config:
        """Validate until nothing is broken; each round puts defaults for at least one broken value."""
        while True:
            values = self.interpolated()
            try:
                return Config.model_validate(nested(values))
            except ValidationError as error:
                self.invalid(error.errors(include_url=False, include_context=False), values)

    def invalid_keys(self) -> frozenset[str]:
        """What is broken, and what takes its value from something broken."""
        invalid_keys = set(self.broken)
        while True:
            more = {
                path for path, value in self.written.items() if references(value) & invalid_keys
            } - invalid_keys
            if not more:
                return frozenset(invalid_keys)
            invalid_keys |= more

    def interpolated(self) -> dict[str, Any]:
        """All values with their references resolved; what cannot be resolved is broken."""
        while True:
            interpolation = Interpolation(self.raw)
            unresolved: dict[frozenset[str], UnresolvedError] = {}
            values = {}
            for path in self.raw:
                try:
                    values[path] = interpolation.get(path)
                except UnresolvedError as error:
                    unresolved.setdefault(frozenset(error.paths), error)
            if not unresolved:
                return values
            for error in unresolved.values():
                guilty = [path for path in error.paths if path in self.own]
                self.complain("C014", guilty[0], str(error))
                self.put_defaults(guilty)

    def invalid(self, errors: Iterable[ErrorDetails], values: Mapping[str, Any]) -> None:
        """Tell what does not fit its key, and put defaults for it; what came from there is tried again with them."""
        by_key: dict[str, list[ErrorDetails]] = defaultdict(list)
        for error in errors:
            by_key[_key_of(error["loc"])].append(error)
        all_guilty = []
        for path, details in by_key.items():
            sources = self.sources(path)
            if by_key.keys().isdisjoint(sources):
                guilty = next(source for source in (path, *sources) if source in self.own)
                self.complain("C015", guilty, _message(path, values[path], self.raw[path], details))
                all_guilty.append(guilty)
        self.put_defaults(all_guilty)

    def sources(self, path: str) -> list[str]:
        """The keys from which a value comes by reference, the nearest first."""
        found: list[str] = []
        ahead = [path]
        while ahead:
            more = [
                key
                for key in sorted(references(self.raw[ahead.pop(0)]))
                if key in self.raw and key not in found
            ]
            found += more
            ahead += more
        return found

    def put_defaults(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.broken.add(path)
            self.own.discard(path)
            self.raw[path] = self.defaults[path]

    def complain(self, code: str, path: str, message: str) -> None:
        place = self.given.places[path]
        self.problems.append(Problem(code, "error", path, message, place.file, place.line))


def _takes_null(path: str) -> bool:
    return NoneType in get_args(keys()[path].field.annotation)


def _key_of(loc: tuple[int | str, ...]) -> str:
    path = ""
    for part in loc:
        path = f"{path}.{part}" if path else str(part)
        if path in keys():
            break
    return path


def _message(path: str, value: Any, raw: Any, details: list[ErrorDetails]) -> str:
    field = keys()[path].field
    takes = expected(field)
    message = f"expected {takes}, not {shown(value)}"
    if references(raw):
        message += f" (from {raw})"
    words = [error["input"] for error in details if isinstance(error["input"], str)]
    near = [found for word in words if (found := nearest(word, choices(field)))]
    if near:
        message += f"; did you mean {near[0]}?"
    elif isinstance(value, bool) and "a string" in takes:
        message += "; if it is meant as a word, quote it"
    return message
