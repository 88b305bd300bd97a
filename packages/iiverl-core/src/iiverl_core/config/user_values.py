"""The values that the user set, in a file and in overrides: each by its full path, with its location."""

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iiverl_core.config.describe import shown
from iiverl_core.config.diagnostics import COMMAND_LINE, Problem, Severity, SourceLocation
from iiverl_core.config.schema import join, keys, sections
from iiverl_core.config.suggest import moved_within, suggest
from iiverl_core.config.synonyms import canonical
from iiverl_core.config.verl_keys import Mark, unread
from iiverl_core.config.yaml_reader import NodePath, ParsedYaml, Unreadable, read_yaml

UNKNOWN_KEY = "C012"


@dataclass(frozen=True)
class UnreadValue:
    """A value of a key of verl that nothing here reads, and why."""

    path: str
    value: Any
    mark: Mark
    location: SourceLocation


@dataclass
class UserValues:
    """The user's values by full path, the location of each, and the problems of keys that are not known."""

    values: dict[str, Any] = field(default_factory=dict)
    locations: dict[str, SourceLocation] = field(default_factory=dict)
    other_names: dict[str, str] = field(default_factory=dict)
    """Names of another version of verl under which keys were set, by key."""

    unread: dict[str, UnreadValue] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    invalid_keys: set[str] = field(default_factory=set)
    """Keys that the user tried to set, to a value that could not be read."""

    allow_unknown: bool = False
    """Whether unknown keys are warnings instead of errors."""

    def report(
        self, code: str, key: str, message: str, location: SourceLocation, severity: Severity = "error"
    ) -> None:
        """Add a problem."""
        self.problems.append(Problem(code, severity, key, message, location.file, location.line))

    def add_file(self, source: ParsedYaml, file: str) -> None:
        """Add the values of a YAML file."""

        def location(path: NodePath) -> SourceLocation:
            return SourceLocation(file, source.lines.get(path))

        self._add(source.values, "", (), location)

    def add_override(self, text: str) -> None:
        """Add one `key=value`, whose value is YAML; or, as in Hydra, `+key=value`, `++key=value`, or `~key`.

        A key is set whether it is added (`+`) or not, and set back to its default by `~`.
        """
        text, location = _decoded(text), SourceLocation(COMMAND_LINE)
        path, _, written = text.partition("=")
        sign, path = re.fullmatch(r"(\+{1,2}|~|)(.*)", path.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
        if problem := _override_problem(text):
            self.report("C010", "", f"{text!r} {problem}", location)
            self.invalid_keys.add(path)
            return
        if sign == "~":
            self._remove(path, location)
            return
        source = read_yaml(written, COMMAND_LINE)
        for problem in source.problems:
            self.report(problem.code, path, f"{problem.message} (in {written!r})", location)
            self.invalid_keys.add(path)
        if not source.problems:
            self._add_one(path, source.values, location)

    def _remove(self, path: str, location: SourceLocation) -> None:
        """Forget the values of a key or section, which then has its default."""
        key, _ = canonical(path, None)
        within = [known for known in self.values if known == key or known.startswith(key + ".")]
        for known in within:
            del self.values[known], self.locations[known]
            self.other_names.pop(known, None)
        for known in [known for known in self.unread if known == path or known.startswith(path + ".")]:
            del self.unread[known]
        holder = next((known for known in self.values if key.startswith(known + ".")), None)
        if holder:
            whole = copy.deepcopy(self.values[holder])
            *names, last = key.removeprefix(holder + ".").split(".")
            inner = whole
            for name in names:
                inner = inner.get(name) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                inner.pop(last, None)
            self.values[holder] = whole
        elif key not in keys() and key not in sections() and not unread(key) and not moved_within(path):
            self._report_unknown(path, None, (), lambda _: location)

    def _add_one(self, path: str, value: Any, location: SourceLocation) -> None:
        if canonical(path, value)[0] != path:
            self._add_other(path, value, (), lambda _: location)
            return
        holder = next((key for key in keys() if path.startswith(key + ".")), None)
        if holder and isinstance(keys()[holder].default, dict):  # a key whose value is a mapping
            whole = copy.deepcopy(self.values.get(holder, keys()[holder].default))
            *names, last = path.removeprefix(holder + ".").split(".")
            inner = whole
            for name in names:
                inner = inner.setdefault(name, {}) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                inner[last] = value
                self._set(holder, whole, location)
                return
        section, _, name = path.rpartition(".")
        if path in sections():
            self._add(value, path, (), lambda _: location)
        elif section in sections():
            self._add({name: value}, section, (), lambda _: location)
        else:
            self._add_other(path, value, (), lambda _: location)

    def _add(
        self, values: Any, section: str, at: NodePath, location: Callable[[NodePath], SourceLocation]
    ) -> None:
        if values is None or isinstance(values, Unreadable):  # an empty section
            return
        if not isinstance(values, Mapping):
            self._report_no_section(values, section, location(at))
            return
        for name, value in values.items():
            path, here = join(section, name), (*at, name)
            if "." in name:
                self._report_dotted(path, location(here))
            elif name and path in sections():
                self._add(value, path, here, location)
            elif path in keys():
                if isinstance(value, Mapping) and isinstance(keys()[path].default, dict):
                    value = self._without_other_names(path, value, here, location)
                self._set(path, value, location(here))
            else:
                self._add_other(path, value, here, location)

    def _without_other_names(
        self,
        path: str,
        values: Mapping[str, Any],
        at: NodePath,
        location: Callable[[NodePath], SourceLocation],
    ) -> dict[str, Any]:
        """Set the keys that entries of a mapping are other names of; return the rest."""
        rest = {}
        for name, value in values.items():
            entry = join(path, name)
            if canonical(entry, value)[0] == entry:
                rest[name] = value
            else:
                self._add_other(entry, value, (*at, name), location)
        return rest

    def _set(self, path: str, value: Any, location: SourceLocation, written: str | None = None) -> None:
        if _unreadable(value):
            self.invalid_keys.add(path)
            return
        if path in self.values and self._contradicts(path, value, location, written or path):
            return
        self.values[path] = value
        self.locations[path] = location
        self.other_names.pop(path, None)
        if written:
            self.other_names[path] = written

    def _contradicts(self, path: str, value: Any, location: SourceLocation, written: str) -> bool:
        """Return whether to keep a key's first value, after reporting a second one under another name in the file.

        Under one of two names, null stands for no value. On the command line, the last value counts.
        """
        first, other = self.locations[path], self.other_names.get(path, path)
        if location.file == COMMAND_LINE or other == written or self.values[path] in (None, value):
            return False
        if value is None:
            return True
        message = (
            f"means {other}, which line {first.line} sets to {shown(self.values[path])}; remove one of them"
        )
        self.report("C018", written, message, location)
        self.invalid_keys.add(path)
        return True

    def _add_other(
        self, path: str, value: Any, at: NodePath, location: Callable[[NodePath], SourceLocation]
    ) -> None:
        """Add the value of a key that this configuration does not have under this name."""
        key, meant = canonical(path, value)
        is_mapping = key in keys() and isinstance(keys()[key].default, dict)
        has_keys = key in sections() or (value and moved_within(path))
        if isinstance(value, Mapping) and not is_mapping and has_keys:
            for name, inner in value.items():
                self._add_other(join(path, name), inner, (*at, name), location)
            return
        holder = next((known for known in keys() if key.startswith(known + ".")), None)
        if key in keys():
            if meant is not None:  # other versions write null for what is set under a newer name
                self._set(key, meant, location(at), written=path if path != key else None)
        elif holder and path != key:
            if meant is not None:
                self._add_one(key, meant, location(at))
        elif mark := unread(key) or unread(path):
            if not _unreadable(value):
                self.unread[path] = UnreadValue(path, value, mark, location(at))
        elif not (key in sections() and value is None):
            self._report_unknown(path, value, at, location)

    def _report_unknown(
        self, path: str, value: Any, at: NodePath, location: Callable[[NodePath], SourceLocation]
    ) -> None:
        meant, hint = suggest(path)
        if meant and not self.allow_unknown:
            self.invalid_keys |= {key for key in keys() if key == meant or key.startswith(meant + ".")}
        severity = "warning" if self.allow_unknown else "error"
        self.report(UNKNOWN_KEY, path, "unknown key" + (f"; {hint}" if hint else ""), location(at), severity)

    def _report_dotted(self, path: str, location: SourceLocation) -> None:
        levels = ": {".join(path.split(".")) + ": …" + "}" * path.count(".")
        self.invalid_keys |= {key for key in keys() if key == path or key.startswith(path + ".")}
        self.report("C011", path, f"a key in a file cannot contain dots; write {levels}", location)

    def _report_no_section(self, value: Any, section: str, location: SourceLocation) -> None:
        what = "expected a section of keys and values" if section else "expected sections of keys and values"
        hint = (
            "; write a space after the colon" if isinstance(value, str) and re.match(r"\w+:\S", value) else ""
        )
        if (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and all(isinstance(v, dict) for v in value)
        ):
            hint = "; write the keys without '- '"
        self.report("C013", section, f"{what}, not {shown(value)}{hint}", location)


def _decoded(text: str) -> str:
    """Decode the bytes of an argument as UTF-8 if they are that, whatever the terminal's encoding."""
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return text


def _override_problem(text: str) -> str | None:
    """Explain why a text is not an override; None if it is one."""
    path, equals, _ = text.partition("=")
    path = path.strip()
    if re.search("[\ud800-\udfff]", text):
        return "is not UTF-8 text"
    if not re.fullmatch(r"(\+{1,2}|~|)[^+~].*", path, re.DOTALL) or not (equals or path.startswith("~")):
        return "is not an override; write key=value, for example trainer.total_epochs=1"
    return None


def _unreadable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_unreadable(item) for item in value.values())
    if isinstance(value, list):
        return any(_unreadable(item) for item in value)
    return isinstance(value, Unreadable)
