"""Apply values to the defaults, resolve references, and validate; invalid values are replaced by their defaults."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from iiverl_core.config.describe import choices, expected, shown
from iiverl_core.config.diagnostics import Problem
from iiverl_core.config.interpolation import Interpolation, UnresolvedError, nested, reference, references
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.root import Config
from iiverl_core.config.suggest import nearest
from iiverl_core.config.user_values import UserValues

UNRESOLVED, INVALID_VALUE = "C014", "C015"


@dataclass(frozen=True)
class Resolved:
    """A valid configuration, and the problems of the values.

    `replaced` are the keys whose invalid user values were replaced by defaults. `invalid_keys` are these and all keys that
    refer to them.
    """

    config: Config
    problems: list[Problem]
    replaced: frozenset[str]
    invalid_keys: frozenset[str]


def resolve(user: UserValues, by_backend: Mapping[str, Any]) -> Resolved:
    """Build the configuration from the user's values; `by_backend` has the defaults of the backend."""
    resolver = _Resolver(user, by_backend)
    config = resolver.run()
    return Resolved(
        config, resolver.problems, frozenset(resolver.invalid - resolver.set_keys), resolver.invalid_keys()
    )


class _Resolver:
    """Resolves and validates in rounds; each round replaces at least one invalid value by its default."""

    def __init__(self, user: UserValues, by_backend: Mapping[str, Any]) -> None:
        self.user = user
        self.defaults = {path: by_backend.get(path, key.default) for path, key in keys().items()}
        followed = {p for p, v in user.values.items() if v is None and self._null_follows(p)}
        self.written = {**self.defaults, **{p: v for p, v in user.values.items() if p not in followed}}
        self.raw = dict(self.written)
        self.set_keys = user.values.keys() - followed
        """Keys that still have the value that the user set."""
        self.problems: list[Problem] = []
        self.invalid = set(user.invalid_keys)

    def _null_follows(self, path: str) -> bool:
        """Return whether null means "follow the other key": the default is a reference, and null itself is not a value."""
        followed = reference(self.defaults[path])
        return followed is not None and (_accepts_null(followed) or not _accepts_null(path))

    def run(self) -> Config:
        """Validate until every value is valid."""
        while True:
            values = self.interpolated()
            try:
                return Config.model_validate(nested(values))
            except ValidationError as error:
                self.report_invalid(error.errors(include_url=False, include_context=False), values)

    def invalid_keys(self) -> frozenset[str]:
        """The invalid keys, and those that refer to one of them."""
        found = set(self.invalid)
        while more := {path for path, value in self.written.items() if references(value) & found} - found:
            found |= more
        return frozenset(found)

    def interpolated(self) -> dict[str, Any]:
        """Resolve all references; a value whose references cannot be resolved is invalid."""
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
                faulty = [path for path in error.paths if path in self.set_keys]
                self.report(UNRESOLVED, faulty[0], str(error))
                self.use_defaults(faulty)

    def report_invalid(self, errors: Iterable[ErrorDetails], values: Mapping[str, Any]) -> None:
        """Report invalid values and replace them by defaults; keys that refer to them are validated again."""
        by_key: dict[str, list[ErrorDetails]] = defaultdict(list)
        for error in errors:
            by_key[_key_of(error["loc"])].append(error)
        at_fault = []
        for path, details in by_key.items():
            sources = self.sources(path)
            if by_key.keys().isdisjoint(sources):
                faulty = next(source for source in (path, *sources) if source in self.set_keys)
                self.report(INVALID_VALUE, faulty, _message(path, values[path], self.raw[path], details))
                at_fault.append(faulty)
        self.use_defaults(at_fault)

    def sources(self, path: str) -> list[str]:
        """The keys that a value refers to, directly or not, the nearest first."""
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

    def use_defaults(self, paths: Iterable[str]) -> None:
        for path in paths:
            self.invalid.add(path)
            self.set_keys.discard(path)
            self.raw[path] = self.defaults[path]

    def report(self, code: str, path: str, message: str) -> None:
        location = self.user.locations[path]
        self.problems.append(Problem(code, "error", path, message, location.file, location.line))


def _accepts_null(path: str) -> bool:
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
    accepted = expected(field)
    message = f"expected {accepted}, not {shown(value)}"
    if references(raw):
        message += f", the value of {raw}"
    words = [error["input"] for error in details if isinstance(error["input"], str)]
    near = [found for word in words if (found := nearest(word, choices(field)))]
    if near:
        message += f"; did you mean {near[0]}?"
    elif isinstance(value, bool) and "a string" in accepted:
        message += "; quote it if it is meant as a string"
    return message
