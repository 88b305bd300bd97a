"""`ConfigView`, which checks read, and `Checks`, which registers them."""

import os.path
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from iiverl_core.config.diagnostics import Problem, Severity, SourceLocation
from iiverl_core.config.roles import ROLE_KEYS, Role
from iiverl_core.config.sections.root import Config


@dataclass(frozen=True)
class ConfigView:
    """A valid configuration, with the origin of its values.

    `locations` has the keys that the user set. `invalid_keys` have defaults in `config`, because the user's values are
    invalid. `file` is the YAML file.
    """

    config: Config
    locations: Mapping[str, SourceLocation]
    invalid_keys: frozenset[str]
    file: str

    def __getitem__(self, path: str) -> Any:
        return self.config.at(path)

    def uses(self, role: Role) -> bool:
        """Return whether the run may have this model."""
        match role:
            case "critic":
                return self.config.uses_critic
            case "reward":
                return self.config.reward_model.enable
            case _:
                return True

    def is_set(self, *paths: str) -> bool:
        """Return whether the user set any of these keys."""
        return any(path in self.locations for path in paths)

    def problem(
        self, code: str, severity: Severity, path: str, message: str, key: str | None = None
    ) -> Problem:
        """Make a problem at the location of `path`, shown as `key` if that is given."""
        place = self.locations.get(path, SourceLocation(self.file))
        return Problem(code, severity, key or path, message, place.file, place.line)


Rule: TypeAlias = Callable[[ConfigView], str | None]


@dataclass(frozen=True)
class Check:
    """A rule over several keys that returns what is wrong, or None.

    It is skipped if one of these keys is invalid, or if the run has no model of its `role`. Its message is reported at
    the first of these keys that the user set; keys of the same section lose the name of the section in the message.
    """

    code: str
    severity: Severity
    reads: tuple[str, ...]
    rule: Rule
    role: Role

    def run(self, view: ConfigView) -> Iterator[Problem]:
        """Yield the problem that the rule finds, if any."""
        if view.invalid_keys.isdisjoint(self.reads) and view.uses(self.role):
            message = self.rule(view)
            if message:
                primary_key = next((key for key in self.reads if view.is_set(key)), self.reads[0])
                section = primary_key.rpartition(".")[0]
                yield view.problem(self.code, self.severity, primary_key, message.replace(section + ".", ""))


class Checks:
    """A list of checks, filled by the decorator `add`."""

    def __init__(self) -> None:
        self.all: list[Check] = []

    def add(self, code: str, severity: Severity, *reads: str, role: Role = "actor") -> Callable[[Rule], Rule]:
        """Register the decorated rule. `reads` are the keys that it reads, the one most likely at fault first.

        Args:
            code: of the diagnostic, in `diagnostics.DIAGNOSTICS`.
        """

        def register(rule: Rule) -> Rule:
            self.all.append(Check(code, severity, (*reads, *ROLE_KEYS[role].decides), rule, role))
            return rule

        return register


def is_local_path(path: str) -> bool:
    """Return whether a name can only be that of a file or folder, not of a Hub repository."""
    repository = re.split("[:@]", path)[0]
    local = path.startswith((".", os.sep, "~")) or repository.count("/") > 1 or path.endswith("/")
    return local or repository.endswith((".parquet", ".jsonl", ".json", ".csv", ".arrow"))


def path_exists(test: Callable[[Path], bool], name: str) -> bool:
    """Test a path with `Path.exists`, `is_file` or `is_dir`; False if the system cannot look it up."""
    try:
        return test(Path(name))
    except (OSError, ValueError):
        return False


def lookup_hint(view: ConfigView, absent: list[str]) -> str:
    """Say where relative paths were looked up, and whether the folder of the YAML file has them."""
    relative = [name for name in absent if not Path(name).is_absolute()]
    if not relative:
        return ""
    folder = Path(view.file).parent.absolute()
    there = all(path_exists(Path.exists, str(folder / name)) for name in relative)
    return f" (looked in {Path.cwd()})" + (f"; it exists in {folder}, so run from there" if there else "")
