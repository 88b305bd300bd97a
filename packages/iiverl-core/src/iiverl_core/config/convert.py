"""Convert a configuration of verl to one of iiverl: keys by their names here, and a list of those that are left out."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from iiverl_core.config.checks import ConfigView
from iiverl_core.config.diagnostics import render
from iiverl_core.config.listing import written
from iiverl_core.config.loading import Collected, Loaded, collect, load_text, validate_values
from iiverl_core.config.omegaconf_values import resolved
from iiverl_core.config.resolve import INVALID_VALUE, UNRESOLVED
from iiverl_core.config.schema import keys, shared_sections
from iiverl_core.config.unused_keys import UNSUPPORTED_VALUE, UNSUPPORTED_VERL_KEY, ignored_keys
from iiverl_core.config.user_values import UNKNOWN_KEY, UserValues
from iiverl_core.errors import ConfigError

VERL_DEFAULTS: Mapping[str, Any] = {
    "actor_rollout_ref.actor.entropy_coeff": 0,
    "algorithm.use_kl_in_reward": False,
}
"""Defaults of verl's objective that are not the defaults here, which are II-VERL's.

A configuration of verl that leaves them out means these. Other defaults that differ change no objective.
"""

COMPOSITION = ("defaults", "hydra")  # what Hydra, not verl, reads

LEAVES_OUT = (UNRESOLVED, INVALID_VALUE, UNSUPPORTED_VALUE, UNSUPPORTED_VERL_KEY)
"""Codes of problems of one value, which is left out."""

_WIDTH = 116


@dataclass(frozen=True)
class Conversion:
    """A converted configuration: its text, and the same text, loaded.

    `unsupported` are keys without which the run is another one than in verl, `unread` those that change nothing here:
    each a reason and the keys that share it.
    """

    text: str
    loaded: Loaded
    unsupported: Mapping[str, tuple[str, ...]]
    unread: Mapping[str, tuple[str, ...]]


def convert(
    path: str | os.PathLike[str] | None,
    overrides: Iterable[str] = (),
    backend: str | None = None,
    *,
    source: str,
    name: str,
    changed: bool = False,
) -> Conversion:
    """Convert a YAML file and overrides of verl.

    Args:
        path: the file; None if the overrides are the whole configuration.
        overrides: as `load` takes them.
        backend: the name of the backend, if the command line selects one.
        source: where the configuration comes from, for the first line of the text.
        name: the name of the new file, for messages.
        changed: leave out values that are the defaults here.

    Raises:
        ConfigError: the file cannot be read, or is not YAML.
    """
    collected = collect(
        path, overrides, backend, allow_unknown=True, prepare=lambda values: resolved(values, keys())
    )
    user = collected.user
    if not collected.is_read:
        raise ConfigError(render(user.problems))
    unsupported: dict[str, list[str]] = {}
    unread: dict[str, list[str]] = {}
    values = dict(user.values)
    for problem in user.problems:
        at = problem.key.partition(".")[0]
        if at in COMPOSITION:
            unread.setdefault("read by Hydra alone", []).append(problem.key)
        else:
            reason = problem.message if problem.code == UNKNOWN_KEY else f"{problem.message} [{problem.code}]"
            unsupported.setdefault(reason, []).append(problem.key or "an override")
    while True:
        loaded = validate_values(collected)
        dropped = _invalid(loaded, user)
        for key, reason in dropped.items():
            if user.values.get(key, reason) is None:  # a value of verl's, but not here
                unread.setdefault("null, as if it were not set", []).append(key)
            else:
                unsupported.setdefault(reason, []).append(key)
        view = ConfigView(loaded.config, user.locations, frozenset(dropped), collected.file)
        for reason, paths in ignored_keys(view, user.unread.values()).items():
            unread.setdefault(reason, []).extend(path for path in paths if path not in dropped)
            dropped |= dict.fromkeys(paths, reason)
        if not dropped:
            break
        user.unread = {}
        user.values = values = {key: value for key, value in values.items() if key not in dropped}
        user.locations = {key: place for key, place in user.locations.items() if key in values}
        collected = Collected(user, collected.file, is_read=True)
    added = {key: value for key, value in VERL_DEFAULTS.items() if key not in values}

    def text_of(values: Mapping[str, Any]) -> str:
        left_out = (
            *_comment(
                "Left out, and not supported here: without them, this is another run than verl's.",
                unsupported,
            ),
            *_comment("Left out, because nothing here reads them.", unread),
        )
        head = f"# Converted from {source} by `iiverl convert`."
        return "\n".join([head, *_yaml({**values, **added}, added), *left_out, ""])

    text = text_of(values)
    if changed:
        least = {key: value for key, value in values.items() if value != keys()[key].default}
        without = load_text(text_of(least), name).config
        text = text_of(
            {k: v for k, v in values.items() if k in least or without.at(k) != loaded.config.at(k)}
        )
    return Conversion(text, load_text(text, name), _frozen(unsupported), _frozen(unread))


def _invalid(loaded: Loaded, user: UserValues) -> dict[str, str]:
    """Return the keys whose values are invalid or unsupported here, with the reason."""
    return {
        problem.key: f"{problem.message} [{problem.code}]"
        for problem in loaded.problems
        if problem.code in LEAVES_OUT and (problem.key in user.values or problem.key in user.unread)
    }


def _yaml(values: Mapping[str, Any], added: Mapping[str, Any]) -> Iterator[str]:
    """Write values in the order of the configuration's keys."""
    previous = ""
    for path in (path for path in keys() if path in values):
        *section, name = path.split(".")
        shared = shared_sections(previous, path)
        yield from ("  " * depth + f"{part}:" for depth, part in enumerate(section) if depth >= shared)
        previous = path
        note = "  # verl's default" if path in added else ""
        yield "  " * len(section) + f"{name}: {written(values[path])}{note}"


def _comment(title: str, by_reason: Mapping[str, list[str]]) -> Iterator[str]:
    """Write keys that are left out as comments, one paragraph per reason."""
    if not by_reason:
        return
    yield "#"
    yield f"# {title}"
    for reason, paths in by_reason.items():
        line = "# -"
        for word in f"{', '.join(paths)}: {reason}".split():
            if len(line) + 1 + len(word) > _WIDTH:
                yield line
                line = "#  "
            line += f" {word}"
        yield line


def _frozen(by_reason: Mapping[str, list[str]]) -> Mapping[str, tuple[str, ...]]:
    return {reason: tuple(paths) for reason, paths in by_reason.items()}
