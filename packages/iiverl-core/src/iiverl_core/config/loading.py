"""From a file and overrides to one validated configuration, with everything that is wrong told at once.

Defaults, the backend's defaults, the file and the overrides are laid over each other; references are resolved; the
whole is validated once. A value that is broken is told, and its default stands in while the rest is checked.
"""

import os
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from iiverl_core.config.checks import View, run_checks
from iiverl_core.config.defaults import STRATEGIES, backend_defaults, fitted_defaults
from iiverl_core.config.interpolation import reference
from iiverl_core.config.problems import COMMAND_LINE, Problem, SourceLocation, in_order, render
from iiverl_core.config.resolve import resolve
from iiverl_core.config.run_config import RunConfig, run_config
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.root import Config
from iiverl_core.config.sections.section import BACKEND
from iiverl_core.config.source import Source, read_yaml
from iiverl_core.config.suggest import nearest
from iiverl_core.config.unused_keys import unused_keys
from iiverl_core.config.user_values import UNKNOWN_KEY, UserValues
from iiverl_core.errors import ConfigError
from iiverl_core.registry import BACKENDS


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    `detail` is the place of a value that the user set; of a default, what it is beyond that: the backend's, another
    key's value, or one that fits other values.
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

    If `errors` is not empty, defaults stand in `config` for what is broken. If the file could not be read at all,
    `is_read` is false, and all of `config` is defaults.
    """

    path: str
    config: Config
    problems: tuple[Problem, ...]
    origins: Mapping[str, Origin] = field(repr=False)
    is_read: bool = True

    @cached_property
    def run(self) -> RunConfig:
        """The run that the configuration describes."""
        return run_config(self.config)

    @property
    def errors(self) -> tuple[Problem, ...]:
        """What makes the configuration wrong, wherever it would run."""
        return tuple(p for p in self.problems if p.severity == "error")

    @property
    def refused(self) -> tuple[Problem, ...]:
        """What has to be corrected in the configuration, or in the files that it names, before it runs anywhere."""
        return tuple(p for p in self.problems if p.severity in ("error", "input"))

    @property
    def obstacles(self) -> tuple[Problem, ...]:
        """What keeps it from running, `refused` and what cannot run with this version or on this machine."""
        return tuple(p for p in self.problems if p.severity != "warning")

    @property
    def unknown_keys(self) -> tuple[Problem, ...]:
        """Unknown keys: errors or, if they are allowed, warnings."""
        return tuple(p for p in self.problems if p.code == UNKNOWN_KEY)


def load(
    path: str | os.PathLike[str],
    overrides: Iterable[str] = (),
    backend: str | None = None,
    *,
    allow_unknown: bool = False,
) -> Loaded:
    """Load and check a YAML file.

    Args:
        path: the file.
        overrides: `key.sub=value`, applied in order; values are YAML.
        backend: its name, over what the file says; by default the file's `actor_rollout_ref.actor.strategy`, else
            `fsdp`.
        allow_unknown: make warnings of unknown keys, which are then left out.

    Nothing is raised for what a file or an override may hold; it stands in `problems`.
    """
    file = os.fspath(path)
    text, problem = _read(file)
    source = read_yaml(text, file)
    if problem:
        source.problems.append(problem)
    return _load(
        UserValues(problems=source.problems, allow_unknown=allow_unknown), file, source, overrides, backend
    )


def build(values: Mapping[str, Any], backend: str | None = None) -> Config:
    """Make a configuration of nested plain values, with defaults for the rest.

    Raises:
        ConfigError: something is wrong with them; all of it is told.
    """
    loaded = _load(UserValues(), "values", Source(values=values), (), backend)
    if loaded.errors:
        raise ConfigError(render(replace(problem, file=None) for problem in loaded.errors))
    return loaded.config


def _read(file: str) -> tuple[str, Problem | None]:
    try:
        return Path(file).read_text(encoding="utf-8-sig"), None
    except FileNotFoundError:
        message = "there is no such file"
    except IsADirectoryError:
        message = "this is a folder; name the YAML file in it"
    except UnicodeDecodeError as error:
        message = f"this is not a text file in UTF-8 (byte {error.start})"
    except (OSError, ValueError) as error:
        message = f"it cannot be read: {getattr(error, 'strerror', None) or error}"
    return "", Problem("C001", "error", "", message, file)


def _load(
    given: UserValues, file: str, source: Source, overrides: Iterable[str], backend: str | None
) -> Loaded:
    is_read = source.values is not None or not source.problems
    given.lay_file(source, file)
    for override in overrides:
        given.lay_override(override)
    if backend is not None:
        _choose_backend(given, backend)
    strategy = given.values.get(BACKEND)
    backend_info = BACKENDS.get(strategy) if isinstance(strategy, str) else None
    by_backend = backend_defaults(backend_info) if backend_info else {}
    resolved = resolve(given, by_backend)
    fitted = fitted_defaults(resolved.config, given.values)
    if fitted:
        resolved = resolve(given, {**by_backend, **{key: value for key, (value, _) in fitted.items()}})
    problems = [*given.problems, *resolved.problems]
    if is_read:
        view = View(resolved.config, given.places, resolved.invalid_keys, file)
        problems += [*run_checks(view), *unused_keys(view)]
    origins = _origins(given, resolved.replaced, by_backend, fitted)
    return Loaded(file, resolved.config, in_order(dict.fromkeys(problems)), origins, is_read)


def _choose_backend(given: UserValues, backend: str) -> None:
    """Let the command line's backend replace the file's, of all models."""
    place = SourceLocation(COMMAND_LINE)
    if backend not in BACKENDS:
        near = nearest(backend, list(BACKENDS))
        hint = f"; did you mean {near}?" if near else ""
        given.complain("C016", "--backend", f"expected {' or '.join(BACKENDS)}, not {backend!r}{hint}", place)
        given.broken.add(BACKEND)
        return
    for key in STRATEGIES:
        strategy = given.values.get(key)
        if strategy is None or _is_of(backend, strategy):
            continue
        if given.places[key] == place:
            message = f"--backend {backend} contradicts {key}={strategy}; leave one of them out"
            given.complain("C017", key, message, place)
            given.broken.add(key)
        else:
            given.values[key], given.places[key] = backend, place
    if given.values.get(BACKEND) is None:
        given.values[BACKEND], given.places[BACKEND] = backend, place


def _is_of(backend: str, strategy: Any) -> bool:
    return isinstance(strategy, str) and strategy in BACKENDS and BACKENDS[strategy] is BACKENDS[backend]


def _origins(
    given: UserValues,
    replaced: Container[str],
    by_backend: Mapping[str, Any],
    fitted: Mapping[str, tuple[Any, str]],
) -> dict[str, Origin]:
    origins = {}
    for path, key in keys().items():
        place = given.places.get(path)
        if place and path in replaced:
            origins[path] = Origin("default", f"; the value from {place} is invalid")
        elif place:
            origins[path] = Origin("override") if place.file == COMMAND_LINE else Origin("file", str(place))
        elif path in fitted:
            origins[path] = Origin("default", f", to fit {fitted[path][1]}")
        elif followed := reference(by_backend.get(path, key.default)):
            origins[path] = Origin("default", f", as {followed}")
        else:
            origins[path] = Origin(
                "default", f" of backend {by_backend[BACKEND]}" if path in by_backend else ""
            )
    return origins
