"""Load a file and overrides into one validated configuration, and report everything that is wrong at once.

The backend's defaults, the file and the overrides are applied to the defaults in that order; references are resolved; the
result is validated. An invalid value is reported and replaced by its default while the rest is checked.
"""

import os
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from iiverl_core.config.checks import ConfigView, run_checks
from iiverl_core.config.defaults import STRATEGIES, backend_defaults, derived_defaults
from iiverl_core.config.diagnostics import COMMAND_LINE, Problem, SourceLocation, by_line, render
from iiverl_core.config.interpolation import reference
from iiverl_core.config.resolve import resolve
from iiverl_core.config.run_config import RunConfig, run_config
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.root import Config
from iiverl_core.config.sections.section import BACKEND
from iiverl_core.config.suggest import nearest
from iiverl_core.config.unused_keys import unused_keys
from iiverl_core.config.user_values import UNKNOWN_KEY, UserValues
from iiverl_core.config.yaml_reader import ParsedYaml, read_yaml
from iiverl_core.errors import ConfigError
from iiverl_core.registry import BACKENDS


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    `detail` is the location of a value that the user set. For a default, it says whether that is the backend's, another
    key's value, or derived from other values.
    """

    kind: Literal["default", "file", "override"]
    detail: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "file":
                return self.detail
            case "override":
                return "command line"
            case _:
                return f"default{self.detail}"


@dataclass(frozen=True)
class Loaded:
    """A configuration, the origin of each of its values, and its diagnostics.

    If `errors` is not empty, `config` has defaults for the invalid values. If the file could not be read at all, `is_read`
    is false and `config` has only defaults.
    """

    path: str
    config: Config
    problems: tuple[Problem, ...]
    origins: Mapping[str, Origin] = field(repr=False)
    is_read: bool = True

    @cached_property
    def run(self) -> RunConfig:
        """The run that the configuration describes, in iiverl's own terms."""
        return run_config(self.config)

    @property
    def errors(self) -> tuple[Problem, ...]:
        """Problems of the configuration itself."""
        return tuple(p for p in self.problems if p.severity == "error")

    @property
    def refused(self) -> tuple[Problem, ...]:
        """Problems of the configuration and of the files that it names; on no machine does it run."""
        return tuple(p for p in self.problems if p.severity in ("error", "input"))

    @property
    def obstacles(self) -> tuple[Problem, ...]:
        """Problems that prevent the run: `refused`, and what this version or this machine does not support."""
        return tuple(p for p in self.problems if p.severity != "warning")

    @property
    def unknown_keys(self) -> tuple[Problem, ...]:
        """Unknown keys: errors or, if they are allowed, warnings."""
        return tuple(p for p in self.problems if p.code == UNKNOWN_KEY)


def load(
    path: str | os.PathLike[str] | None,
    overrides: Iterable[str] = (),
    backend: str | None = None,
    *,
    allow_unknown: bool = False,
) -> Loaded:
    """Load and check a YAML file.

    Args:
        path: the file; None if the overrides are the whole configuration.
        overrides: `key.sub=value`, applied in order; values are YAML. Hydra's `+key=value`, `++key=value` and `~key` are
            read too.
        backend: the name of the backend, which replaces the file's `actor_rollout_ref.actor.strategy`.
        allow_unknown: warn about unknown keys and ignore them, instead of reporting errors.

    Raises nothing about the contents of the file and the overrides; those problems are in `problems`.
    """
    return validate_values(collect(path, overrides, backend, allow_unknown=allow_unknown))


@dataclass(frozen=True)
class Collected:
    """The user's values from a file and overrides, before they are validated; `is_read` is as in `Loaded`."""

    user: UserValues
    file: str
    is_read: bool


def collect(
    path: str | os.PathLike[str] | None,
    overrides: Iterable[str] = (),
    backend: str | None = None,
    *,
    allow_unknown: bool = False,
    prepare: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Collected:
    """Read the values of a file, on which `prepare` is called first, and of overrides; otherwise as `load`."""
    file = COMMAND_LINE if path is None else os.fspath(path)
    text, problem = ("", None) if path is None else _read(file)
    source = read_yaml(text, file)
    if prepare is not None and isinstance(source.values, Mapping):
        source.values = prepare(source.values)
    if problem:
        source.problems.append(problem)
    user = UserValues(problems=source.problems, allow_unknown=allow_unknown)
    return _collect(user, file, source, overrides, backend)


def load_values(values: Mapping[str, Any], file: str, overrides: Iterable[str] = ()) -> Loaded:
    """Load and check nested plain values as `load` does those of a file; `file` names them in messages."""
    return validate_values(_collect(UserValues(), file, ParsedYaml(values=values), overrides, None))


def build(values: Mapping[str, Any], backend: str | None = None) -> Config:
    """Build a configuration from nested plain values, with defaults for the rest.

    Raises:
        ConfigError: the values are invalid; lists every error.
    """
    loaded = validate_values(_collect(UserValues(), "values", ParsedYaml(values=values), (), backend))
    if loaded.errors:
        raise ConfigError(render(replace(problem, file=None) for problem in loaded.errors))
    return loaded.config


def _read(file: str) -> tuple[str, Problem | None]:
    try:
        return Path(file).read_text(encoding="utf-8-sig"), None
    except FileNotFoundError:
        message = "the file does not exist"
    except IsADirectoryError:
        message = "this is a folder; name the YAML file in it"
    except UnicodeDecodeError as error:
        message = f"this is not a text file in UTF-8 (byte {error.start})"
    except (OSError, ValueError) as error:
        message = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return "", Problem("C001", "error", "", message, file)


def load_text(text: str, name: str) -> Loaded:
    """Load the text of a YAML file that is called `name`."""
    source = read_yaml(text, name)
    return validate_values(_collect(UserValues(problems=source.problems), name, source, (), None))


def _collect(
    user: UserValues, file: str, source: ParsedYaml, overrides: Iterable[str], backend: str | None
) -> Collected:
    is_read = source.values is not None or not source.problems
    user.add_file(source, file)
    for override in overrides:
        user.add_override(override)
    if backend is not None:
        _choose_backend(user, backend)
    return Collected(user, file, is_read)


def validate_values(collected: Collected) -> Loaded:
    """Validate the user's values; see `load`."""
    user, file, is_read = collected.user, collected.file, collected.is_read
    strategy = user.values.get(BACKEND)
    backend_info = BACKENDS.get(strategy) if isinstance(strategy, str) else None
    by_backend = backend_defaults(backend_info) if backend_info else {}
    resolved = resolve(user, by_backend)
    derived = derived_defaults(resolved.config, user.values)
    if derived:
        resolved = resolve(user, {**by_backend, **{key: value for key, (value, _) in derived.items()}})
    problems = [*user.problems, *resolved.problems]
    if is_read:
        view = ConfigView(resolved.config, user.locations, resolved.invalid_keys, file)
        problems += [*run_checks(view), *unused_keys(view, user.unread.values())]
    problems = [_under_its_name(problem, user.other_names) for problem in problems]
    origins = _origins(user, resolved.replaced, by_backend, derived)
    return Loaded(file, resolved.config, by_line(dict.fromkeys(problems)), origins, is_read)


def _under_its_name(problem: Problem, other_names: Mapping[str, str]) -> Problem:
    """Add the name that the user wrote to a problem of a key that has another here."""
    written = other_names.get(problem.key)
    if written is None or written in problem.message:
        return problem
    return replace(problem, message=f"{problem.message} (written as {written})")


def _choose_backend(user: UserValues, backend: str) -> None:
    """Replace the backend of every model by the command line's."""
    location = SourceLocation(COMMAND_LINE)
    if backend not in BACKENDS:
        near = nearest(backend, list(BACKENDS))
        hint = f"; did you mean {near}?" if near else ""
        user.report("C016", "--backend", f"expected {' or '.join(BACKENDS)}, not {backend!r}{hint}", location)
        user.invalid_keys.add(BACKEND)
        return
    for key in STRATEGIES:
        strategy = user.values.get(key)
        if strategy is None or _is_of(backend, strategy):
            continue
        if user.locations[key] == location:
            message = f"--backend {backend} contradicts {key}={strategy}; remove one of them"
            user.report("C017", key, message, location)
            user.invalid_keys.add(key)
        else:
            user.values[key], user.locations[key] = backend, location
    if user.values.get(BACKEND) is None:
        user.values[BACKEND], user.locations[BACKEND] = backend, location


def _is_of(backend: str, strategy: Any) -> bool:
    return isinstance(strategy, str) and strategy in BACKENDS and BACKENDS[strategy] is BACKENDS[backend]


def _origins(
    user: UserValues,
    replaced: Container[str],
    by_backend: Mapping[str, Any],
    derived: Mapping[str, tuple[Any, str]],
) -> dict[str, Origin]:
    origins = {}
    for path, key in keys().items():
        location = user.locations.get(path)
        if location and path in replaced:
            origins[path] = Origin("default", f"; the value from {location} is invalid")
        elif location:
            origins[path] = (
                Origin("override") if location.file == COMMAND_LINE else Origin("file", str(location))
            )
        elif path in derived:
            origins[path] = Origin("default", f", derived from {derived[path][1]}")
        elif followed := reference(by_backend.get(path, key.default)):
            origins[path] = Origin("default", f", same as {followed}")
        else:
            origins[path] = Origin(
                "default", f" of backend {by_backend[BACKEND]}" if path in by_backend else ""
            )
    return origins
