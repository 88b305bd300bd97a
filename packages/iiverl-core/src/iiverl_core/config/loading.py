"""From a file and overrides to one validated configuration, with everything that is wrong told at once.

Defaults, the backend's defaults, the file and the overrides are laid over each other; references are resolved; the
whole is validated once. A value that is broken is told, and its default stands in while the rest is checked.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path
from typing import Any, Literal

from iiverl_core.config.checks import View, run_checks
from iiverl_core.config.checks.devices import TENSOR_PARALLEL
from iiverl_core.config.defaults import backend_defaults
from iiverl_core.config.effects import effects
from iiverl_core.config.given import Given
from iiverl_core.config.interpolation import reference
from iiverl_core.config.problems import COMMAND_LINE, Problem, in_order, render
from iiverl_core.config.resolve import resolve
from iiverl_core.config.schema import keys
from iiverl_core.config.sections.root import Config
from iiverl_core.config.sections.section import BACKEND
from iiverl_core.config.source import Source, read_yaml
from iiverl_core.config.suggest import nearest
from iiverl_core.errors import ConfigError
from iiverl_core.registry import BACKENDS


@dataclass(frozen=True)
class Origin:
    """Where a value comes from: `detail` is the backend, the key that is followed, or the place."""

    kind: Literal["default", "backend", "follows", "file", "override"]
    detail: str = ""

    def __str__(self) -> str:
        match self.kind:
            case "backend":
                return f"default ({self.detail})"
            case "follows":
                return f"default, as {self.detail}"
            case "file":
                return self.detail
            case _:
                return self.kind


@dataclass(frozen=True)
class Loaded:
    """A configuration, where each of its values comes from, and all there is to tell about it.

    Where `errors` is not empty, defaults stand in `config` for what is broken.
    """

    path: str
    config: Config
    problems: tuple[Problem, ...]
    origins: Mapping[str, Origin] = field(repr=False)

    @property
    def errors(self) -> tuple[Problem, ...]:
        """What makes the configuration wrong, wherever it would run."""
        return tuple(p for p in self.problems if p.severity == "error")

    @property
    def obstacles(self) -> tuple[Problem, ...]:
        """What keeps it from running with this version and on this machine, errors among them."""
        return tuple(p for p in self.problems if p.severity != "warning")


def load(path: str | os.PathLike[str], overrides: Iterable[str] = (), backend: str | None = None) -> Loaded:
    """Load and check a YAML file.

    Args:
        path: the file.
        overrides: `key.sub=value`, applied in order; values are YAML.
        backend: its name; by default what the file's `actor_rollout_ref.actor.strategy` says, else `fsdp`.

    Nothing is raised for what a file or an override may hold; it stands in `problems`.
    """
    file = os.fspath(path)
    text, problem = _read(file)
    source = read_yaml(text, file)
    if problem:
        source.problems.append(problem)
    return _load(file, source, overrides, backend)


def build(values: Mapping[str, Any], backend: str | None = None) -> Config:
    """Make a configuration of nested plain values, with defaults for the rest.

    Raises:
        ConfigError: something is wrong with them; all of it is told.
    """
    loaded = _load("values", Source(values=values), (), backend)
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
    return "", Problem("error", "", message, file)


def _load(file: str, source: Source, overrides: Iterable[str], backend: str | None) -> Loaded:
    given = Given(problems=source.problems)
    readable = source.values is not None or not source.problems
    given.lay_file(source, file)
    for override in overrides:
        given.lay_override(override)
    by_backend = _backend_defaults(given, backend)
    defaults = {**by_backend, **_no_validation(given)}
    resolved = resolve(given, defaults)
    if fitting := _fitting_engines(given, resolved.config):
        resolved = resolve(given, {**defaults, **fitting})
    problems = [*given.problems, *resolved.problems]
    if readable:
        view = View(resolved.config, given.places, resolved.tainted, file)
        problems += [*run_checks(view), *effects(view)]
    return Loaded(file, resolved.config, in_order(dict.fromkeys(problems)), _origins(given, by_backend))


def _no_validation(given: Given) -> Mapping[str, Any]:
    """Who names training data and no validation data wants none, rather than the default's."""
    named = any(path == "data.train_files" for path in given.places)
    return {"data.val_files": None} if named and "data.val_files" not in given.places else {}


def _fitting_engines(given: Given, config: Config) -> Mapping[str, Any]:
    """Who says nothing of engines over several devices gets the largest, up to the default's, that fit a machine."""
    trainer, default = config.trainer, config.actor_rollout_ref.rollout.tensor_model_parallel_size
    fitting = gcd(default, trainer.rollout_devices or trainer.n_gpus_per_node)
    return {} if TENSOR_PARALLEL in given.values or fitting == default else {TENSOR_PARALLEL: fitting}


def _backend_defaults(given: Given, backend: str | None) -> Mapping[str, Any]:
    strategy = given.values.get(BACKEND)
    if backend is not None and backend not in BACKENDS:
        near = nearest(backend, list(BACKENDS))
        hint = f"; did you mean {near}?" if near else ""
        message = f"expected {' or '.join(BACKENDS)}, not {backend!r}{hint}"
        given.problems.append(Problem("error", "--backend", message, COMMAND_LINE))
        given.broken.add(BACKEND)
        backend = None
    elif (
        backend
        and isinstance(strategy, str)
        and strategy in BACKENDS
        and BACKENDS[strategy] is not BACKENDS[backend]
    ):
        message = f"--backend {backend} contradicts {BACKEND}: {strategy}; leave one of them out"
        given.complain(BACKEND, message, given.places[BACKEND])
        given.broken.add(BACKEND)
    elif backend and (absent := BACKENDS[backend].missing()):
        given.problems.append(Problem("here", "--backend", absent, COMMAND_LINE))
        given.broken.add(BACKEND)
    chosen = backend or strategy
    return backend_defaults(BACKENDS[chosen]) if isinstance(chosen, str) and chosen in BACKENDS else {}


def _origins(given: Given, by_backend: Mapping[str, Any]) -> dict[str, Origin]:
    origins = {}
    for path, key in keys().items():
        followed = reference(by_backend.get(path, key.default))
        if path in given.places:
            place = given.places[path]
            origins[path] = Origin("override") if place.file == COMMAND_LINE else Origin("file", str(place))
        elif followed:
            origins[path] = Origin("follows", followed)
        else:
            backend_says = path in by_backend
            origins[path] = Origin("backend", by_backend[BACKEND]) if backend_says else Origin("default")
    return origins
