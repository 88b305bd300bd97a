"""What of a configuration has no effect, or cannot be done yet, by the marks on its keys."""

from collections import defaultdict
from collections.abc import Iterator

from iiverl_core.config.checks.view import View
from iiverl_core.config.describe import either, shown
from iiverl_core.config.problems import Problem
from iiverl_core.config.schema import Key, keys, shared_sections
from iiverl_core.config.sections.section import BACKEND, ENGINE, NoEffect, NotYet, OnlyWhen, is_own
from iiverl_core.registry import BACKENDS

ALL_NAMED = 8


def unused_keys(view: View) -> list[Problem]:
    """Tell what was set and is not read, and what is asked for and not there; unread keys by reason."""
    unread: dict[str, list[str]] = defaultdict(list)
    problems: list[Problem] = []
    for path, key in keys().items():
        if path in view.invalid_keys:
            continue
        marks = sorted(key.marks, key=lambda mark: not isinstance(mark, NoEffect))
        reason = next((why for mark in marks if (why := _unread(view, key, mark))), None)
        if reason:
            if view.given(path):
                unread[reason].append(path)
        elif any(isinstance(m, NotYet) and m.blocks and view[path] not in m.ready for m in key.marks):
            problems.append(view.problem("C032", "here", path, _missing(view, key)))
    for reason, paths in unread.items():
        first = min(paths, key=lambda path: view.places[path].line or 0)
        problems.append(
            view.problem("C031", "warning", first, f"has no effect: {reason}", key=_together(paths))
        )
    return problems


def _unread(view: View, key: Key, mark: NoEffect | NotYet | OnlyWhen) -> str | None:
    match mark:
        case NoEffect(why):
            return why
        case NotYet(what, ready, blocks):
            return None if blocks or view[key.path] in ready else f"not in this version: {what}"
        case OnlyWhen():
            if any(_met(view, key, condition) for condition in _conditions(mark)):
                return None
            return _reader(mark) + (f"; {mark.instead} does the same here" if mark.instead else "")


def _conditions(mark: OnlyWhen) -> Iterator[OnlyWhen]:
    condition: OnlyWhen | None = mark
    while condition:
        yield condition
        condition = condition.otherwise


def _met(view: View, key: Key, condition: OnlyWhen) -> bool:
    """Whether a condition holds, or nothing can be said of it."""
    if condition.key == key.path or condition.key in view.invalid_keys:
        return True
    value = view[condition.key]
    return value in condition.values or (condition.own and is_own(value))


def _reader(mark: OnlyWhen) -> str:
    if mark.key == BACKEND:
        titles = dict.fromkeys(BACKENDS[name].title for name in mark.values)
        return f"read only by the {either(list(titles))} backend"
    if mark.key == ENGINE:
        return f"read only by the rollout engine {either(list(mark.values))}"
    with_any = [f"{c.key}: {either([_plain(value) for value in c.values])}" for c in _conditions(mark)]
    return f"read only with {', or '.join(with_any)}"


def _missing(view: View, key: Key) -> str:
    mark = next(m for m in key.marks if isinstance(m, NotYet))
    ready = either([_plain(value) for value in mark.ready])
    default = "" if view.given(key.path) else " (the default)"
    return f"not in this version: {mark.what.format(view[key.path])}{default}; set it to {ready}"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else shown(value)


def _together(paths: list[str]) -> str:
    """Write several keys as one: `section.{a, b.c}`."""
    if len(paths) == 1:
        return paths[0]
    depth = min(shared_sections(paths[0], path) for path in paths)
    names = [".".join(path.split(".")[depth:]) for path in paths]
    more = f", and {len(names) - ALL_NAMED} more" if len(names) > ALL_NAMED else ""
    listed = ", ".join(names[:ALL_NAMED]) + more
    return f"{'.'.join(paths[0].split('.')[:depth])}.{{{listed}}}" if depth else listed
