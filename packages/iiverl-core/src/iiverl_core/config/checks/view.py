"""What a check sees, and how checks are made."""

import os.path
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from iiverl_core.config.problems import Problem, Severity, SourceLocation
from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.sections.root import Config


@dataclass(frozen=True)
class View:
    """A valid configuration, and how it came about.

    `places` names the keys that the user set, and where; `invalid_keys` the keys whose values say nothing, because what was
    given for them is broken; `file` the file.
    """

    config: Config
    places: Mapping[str, SourceLocation]
    invalid_keys: frozenset[str]
    file: str

    def __getitem__(self, path: str) -> Any:
        return self.config.at(path)

    def uses(self, role: Role) -> bool:
        """Whether the run has this model."""
        match role:
            case "critic":
                return self.config.uses_critic
            case "reward":
                return self.config.reward_model.enable
            case _:
                return True

    def given(self, *paths: str) -> bool:
        """Whether the user set any of these keys."""
        return any(path in self.places for path in paths)

    def problem(
        self, code: str, severity: Severity, path: str, message: str, key: str | None = None
    ) -> Problem:
        """Make a problem that stands where `path` was set; `key` is shown in its place."""
        place = self.places.get(path, SourceLocation(self.file))
        return Problem(code, severity, key or path, message, place.file, place.line)


Rule: TypeAlias = Callable[[View], str | None]


@dataclass(frozen=True)
class Check:
    """A rule over several keys: it returns what is wrong, or None.

    It is not asked when one of the keys it reads is broken, or when the run has no model of its `role`. What it tells
    stands at the first of those keys that the user set, and names keys of the same section without it.
    """

    code: str
    severity: Severity
    reads: tuple[str, ...]
    rule: Rule
    role: Role

    def run(self, view: View) -> Iterator[Problem]:
        """Yield the problem that the rule finds, if any."""
        if view.invalid_keys.isdisjoint(self.reads) and view.uses(self.role):
            message = self.rule(view)
            if message:
                primary_key = next((key for key in self.reads if view.given(key)), self.reads[0])
                section = primary_key.rpartition(".")[0]
                yield view.problem(self.code, self.severity, primary_key, message.replace(section + ".", ""))


class Checks:
    """A list of checks, filled by the decorators that are its methods."""

    def __init__(self) -> None:
        self.all: list[Check] = []

    def add(self, code: str, severity: Severity, *reads: str, role: Role = "actor") -> Callable[[Rule], Rule]:
        """Make a check of the decorated rule, which reads these keys of a role's; the one to blame first.

        Args:
            code: its key in `diagnostics.DIAGNOSTICS`.
        """

        def register(rule: Rule) -> Rule:
            self.all.append(Check(code, severity, (*reads, *ROLE_KEYS[role].decides), rule, role))
            return rule

        return register


def on_disk(path: str) -> bool:
    """Whether a name can only be that of a file or folder, not of something on the Hub."""
    repository = re.split("[:@]", path)[0]
    looks = path.startswith((".", os.sep, "~")) or repository.count("/") > 1 or path.endswith("/")
    return looks or repository.endswith((".parquet", ".jsonl", ".json", ".csv", ".arrow"))


def is_there(what: Callable[[Path], bool], name: str) -> bool:
    """Ask about a path; one that the system cannot even look up is not there."""
    try:
        return what(Path(name))
    except (OSError, ValueError):
        return False


def looked_up(view: View, absent: list[str]) -> str:
    """Say from where relative paths were looked up, and whether the YAML file's own folder has them."""
    relative = [name for name in absent if not Path(name).is_absolute()]
    if not relative:
        return ""
    folder = Path(view.file).parent.absolute()
    there = all(is_there(Path.exists, str(folder / name)) for name in relative)
    return f", looked up from {Path.cwd()}" + (f"; run from {folder}, which has it" if there else "")
