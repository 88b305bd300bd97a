"""Report keys that have no effect and values that are not supported, by the marks on the keys."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from iiverl_core.config.checks.check import ConfigView
from iiverl_core.config.describe import either, shown
from iiverl_core.config.diagnostics import Problem
from iiverl_core.config.interpolation import reference
from iiverl_core.config.schema import Key, keys, shared_sections
from iiverl_core.config.sections.section import BACKEND, ENGINE, NoEffect, NotYet, OnlyWhen, is_user_function
from iiverl_core.config.user_values import UnreadValue
from iiverl_core.registry import BACKENDS

UNSUPPORTED_VALUE, UNSUPPORTED_VERL_KEY = "C032", "C033"
MAX_LISTED_KEYS = 8
NOT_SUPPORTED = "not supported in this version: "


def unused_keys(view: ConfigView, unread: Iterable[UnreadValue]) -> list[Problem]:
    """Report keys that the user set but nothing reads, grouped by reason, and values that are not supported.

    `unread` are the values of keys of verl that are not keys of this configuration.
    """
    unread = list(unread)
    problems: list[Problem] = []
    locations = dict(view.locations) | {found.path: found.location for found in unread}
    for path, key in keys().items():
        if path in view.invalid_keys or _reason(view, key):
            continue
        if any(isinstance(m, NotYet) and m.blocks and view[path] not in m.ready for m in key.marks):
            problems.append(view.problem(UNSUPPORTED_VALUE, "unsupported", path, _missing(view, key)))
    for found in unread:
        match found.mark:
            case NotYet(what, ready, blocks=True) if not _is_ready(view, found.value, ready):
                message = NOT_SUPPORTED + what + (f"; {_set_to(ready)}" if ready else "; remove it")
                place = found.location
                problems.append(
                    Problem(UNSUPPORTED_VERL_KEY, "unsupported", found.path, message, place.file, place.line)
                )
    for reason, paths in ignored_keys(view, unread).items():
        place = locations[min(paths, key=lambda path: locations[path].line or 0)]
        message = f"has no effect: {reason}"
        problems.append(Problem("C031", "warning", _join_keys(paths), message, place.file, place.line))
    return problems


def ignored_keys(view: ConfigView, unread: Iterable[UnreadValue]) -> dict[str, list[str]]:
    """Return the keys that the user set and nothing reads, by reason; `unread` is as in `unused_keys`."""
    ignored: dict[str, list[str]] = defaultdict(list)
    for path, key in keys().items():
        if path not in view.invalid_keys and view.is_set(path) and (reason := _reason(view, key)):
            ignored[reason].append(path)
    for found in unread:
        match found.mark:
            case NoEffect(why):
                ignored[why].append(found.path)
            case NotYet(what, ready, blocks=False) if not _is_ready(view, found.value, ready):
                ignored[NOT_SUPPORTED + what].append(found.path)
    return ignored


def _reason(view: ConfigView, key: Key) -> str | None:
    """Return why nothing reads a key; None if something does."""
    marks = sorted(key.marks, key=lambda mark: not isinstance(mark, NoEffect))
    return next((why for mark in marks if (why := _why_ignored(view, key, mark))), None)


def _is_ready(view: ConfigView, value: Any, ready: tuple[Any, ...]) -> bool:
    followed = reference(value)
    return (view[followed] if followed and followed in keys() else value) in ready


def _why_ignored(view: ConfigView, key: Key, mark: NoEffect | NotYet | OnlyWhen) -> str | None:
    match mark:
        case NoEffect(why):
            return why
        case NotYet(what, ready, blocks):
            return None if blocks or view[key.path] in ready else NOT_SUPPORTED + what
        case OnlyWhen():
            if any(_met(view, key, condition) for condition in _conditions(mark)):
                return None
            return _reader(mark) + (f"; use {mark.instead} instead" if mark.instead else "")


def _conditions(mark: OnlyWhen) -> Iterator[OnlyWhen]:
    condition: OnlyWhen | None = mark
    while condition:
        yield condition
        condition = condition.otherwise


def _met(view: ConfigView, key: Key, condition: OnlyWhen) -> bool:
    """Return whether a condition holds, or cannot be evaluated."""
    if condition.key == key.path or condition.key in view.invalid_keys:
        return True
    value = view[condition.key]
    return value in condition.values or (condition.custom and is_user_function(value))


def _reader(mark: OnlyWhen) -> str:
    if mark.key == BACKEND:
        titles = dict.fromkeys(BACKENDS[name].title for name in mark.values)
        return f"read only by the {either(list(titles))} backend"
    if mark.key == ENGINE:
        return f"read only by the rollout engine {either(list(mark.values))}"
    with_any = [f"{c.key}: {either([_plain(value) for value in c.values])}" for c in _conditions(mark)]
    return f"read only with {', or '.join(with_any)}"


def _missing(view: ConfigView, key: Key) -> str:
    mark = next(m for m in key.marks if isinstance(m, NotYet))
    default = "" if view.is_set(key.path) else " (the default)"
    return f"{NOT_SUPPORTED}{mark.what.format(view[key.path])}{default}; {_set_to(mark.ready)}"


def _set_to(ready: tuple[Any, ...]) -> str:
    return f"set it to {either([_plain(value) for value in ready])}"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else shown(value)


def _join_keys(paths: list[str]) -> str:
    """Write several keys as one: `section.{a, b.c}`."""
    if len(paths) == 1:
        return paths[0]
    depth = min(shared_sections(paths[0], path) for path in paths)
    names = [".".join(path.split(".")[depth:]) for path in paths]
    more = f", and {len(names) - MAX_LISTED_KEYS} more" if len(names) > MAX_LISTED_KEYS else ""
    listed = ", ".join(names[:MAX_LISTED_KEYS]) + more
    return f"{'.'.join(paths[0].split('.')[:depth])}.{{{listed}}}" if depth else listed
