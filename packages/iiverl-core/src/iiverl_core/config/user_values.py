"""What the user gave: values by full path, each with its place, from a file's sections and from overrides."""

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from iiverl_core.config.describe import shown
from iiverl_core.config.problems import COMMAND_LINE, Problem, Severity, SourceLocation
from iiverl_core.config.schema import join, keys, sections
from iiverl_core.config.source import Path, Source, Unreadable, read_yaml
from iiverl_core.config.suggest import moved_within, suggest

UNKNOWN_KEY = "C012"


@dataclass
class UserValues:
    """Values by the full path of their key, the place of each, and what could not be laid over the known keys."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, SourceLocation] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: set[str] = field(default_factory=set)
    """Keys that were meant to be given, and are not known to what value."""

    allow_unknown: bool = False
    """Whether unknown keys are warnings, as in files of later versions."""

    def complain(
        self, code: str, key: str, message: str, place: SourceLocation, severity: Severity = "error"
    ) -> None:
        """Note what is wrong with something that the user gave."""
        self.problems.append(Problem(code, severity, key, message, place.file, place.line))

    def lay_file(self, source: Source, file: str) -> None:
        """Take the values of a YAML file."""

        def place(path: Path) -> SourceLocation:
            return SourceLocation(file, source.lines.get(path))

        self._lay(source.values, "", (), place)

    def lay_override(self, text: str) -> None:
        """Take one `key=value`; the value is YAML."""
        text, place = _decoded(text), SourceLocation(COMMAND_LINE)
        path, _, written = text.partition("=")
        path = path.strip()
        if problem := _no_override(text):
            self.complain("C010", "", f"{text!r} {problem}", place)
            self.broken.add(path)
            return
        source = read_yaml(written, COMMAND_LINE)
        for problem in source.problems:
            self.complain(problem.code, path, f"{problem.message} (in {written!r})", place)
            self.broken.add(path)
        if not source.problems:
            self._lay_one(path, source.values, place)

    def _lay_one(self, path: str, value: Any, place: SourceLocation) -> None:
        holder = next((key for key in keys() if path.startswith(key + ".")), None)
        if holder and isinstance(keys()[holder].default, dict):  # into a key that holds keys of its own
            whole = copy.deepcopy(self.values.get(holder, keys()[holder].default))
            *names, last = path.removeprefix(holder + ".").split(".")
            inner = whole
            for name in names:
                inner = inner.setdefault(name, {}) if isinstance(inner, dict) else None
            if isinstance(inner, dict):
                inner[last] = value
                self._take(holder, whole, place)
                return
        section, _, name = path.rpartition(".")
        if path in sections():
            self._lay(value, path, (), lambda _: place)
        elif section in sections():
            self._lay({name: value}, section, (), lambda _: place)
        else:
            self._unknown(path, value, (), lambda _: place)

    def _lay(self, values: Any, section: str, at: Path, place: Callable[[Path], SourceLocation]) -> None:
        if values is None or isinstance(values, Unreadable):  # a section that is named and left empty
            return
        if not isinstance(values, Mapping):
            self._no_section(values, section, place(at))
            return
        for name, value in values.items():
            path, here = join(section, name), (*at, name)
            if "." in name:
                self._dotted(path, place(here))
            elif name and path in sections():
                self._lay(value, path, here, place)
            elif path in keys():
                self._take(path, value, place(here))
            else:
                self._unknown(path, value, here, place)

    def _take(self, path: str, value: Any, place: SourceLocation) -> None:
        if _unreadable(value):
            self.broken.add(path)
        else:
            self.values[path] = value
            self.places[path] = place

    def _unknown(self, path: str, value: Any, at: Path, place: Callable[[Path], SourceLocation]) -> None:
        if moved_within(path) and isinstance(value, Mapping) and value:
            for name, inner in value.items():
                self._unknown(join(path, name), inner, (*at, name), place)
            return
        meant, hint = suggest(path)
        if meant and not self.allow_unknown:
            self.broken |= {key for key in keys() if key == meant or key.startswith(meant + ".")}
        severity = "warning" if self.allow_unknown else "error"
        self.complain(UNKNOWN_KEY, path, "unknown key" + (f"; {hint}" if hint else ""), place(at), severity)

    def _dotted(self, path: str, place: SourceLocation) -> None:
        levels = ": {".join(path.split(".")) + ": …" + "}" * path.count(".")
        self.broken |= {key for key in keys() if key == path or key.startswith(path + ".")}
        self.complain("C011", path, f"in a file, a dot does not lead into a section; write {levels}", place)

    def _no_section(self, value: Any, section: str, place: SourceLocation) -> None:
        what = (
            "this is a section of keys and values"
            if section
            else "a configuration is a section of keys and values"
        )
        hint = (
            "; write a space after the colon" if isinstance(value, str) and re.match(r"\w+:\S", value) else ""
        )
        if (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and all(isinstance(v, dict) for v in value)
        ):
            hint = "; write its keys without the '- '"
        self.complain("C013", section, f"{what}, not {shown(value)}{hint}", place)


def _decoded(text: str) -> str:
    """Read the bytes of an argument as UTF-8 where the terminal's encoding could not; what it could is unchanged."""
    try:
        return os.fsencode(text).decode("utf-8") if re.search("[\ud800-\udfff]", text) else text
    except UnicodeError:
        return text


def _no_override(text: str) -> str | None:
    """Say what keeps a text from being an override, None if it is one."""
    path, equals, written = text.partition("=")
    path, bare = path.strip(), path.strip().lstrip("+~")
    if re.search("[\ud800-\udfff]", text):
        return "is not text in UTF-8"
    if not equals or not path:
        return "is not an override; write key=value, as in trainer.total_epochs=1"
    if bare != path:
        hint = f"write {bare}={written}" if path.startswith("+") else f"write {bare}=null"
        return f"adds or removes a key, and overrides only set values; {hint}"
    return None


def _unreadable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_unreadable(item) for item in value.values())
    if isinstance(value, list):
        return any(_unreadable(item) for item in value)
    return isinstance(value, Unreadable)
