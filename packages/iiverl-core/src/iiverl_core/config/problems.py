"""What is wrong with a configuration, and how it is told."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

Severity: TypeAlias = Literal["error", "input", "here", "warning"]

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Problem:
    """One diagnostic of a configuration; `diagnostics.py` names its code.

    `error`: it is wrong. `input`: a file that it names is missing, or is not what the run needs. `here`: it is right, and
    cannot run with this version or on this machine. `warning`: it runs, and perhaps not as meant. `file` is the YAML
    file or `COMMAND_LINE`; `line` counts from 1.
    """

    code: str
    severity: Severity
    key: str
    message: str
    file: str | None = None
    line: int | None = None


@dataclass(frozen=True)
class SourceLocation:
    """Where a value was given."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


def in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Sort by line, what has none last."""
    return tuple(sorted(problems, key=lambda p: (p.file == COMMAND_LINE, p.line is None, p.line or 0)))


def render(problems: Iterable[Problem], *, running: bool = False) -> str:
    """Write one line per problem, for a terminal: `file:line: severity[code]: key: message`.

    Where a run is about to start (`running`), what cannot run here is an error; else it is a warning.
    """
    return "\n".join(_render(problem, running) for problem in problems)


def _render(problem: Problem, running: bool) -> str:
    severity = problem.severity
    if severity == "input":
        severity = "error"
    elif severity == "here":
        severity = "error" if running else "warning"
    place = [str(SourceLocation(problem.file, problem.line))] if problem.file else []
    key = [problem.key] if problem.key else []
    line = ": ".join([*place, f"{severity}[{problem.code}]", *key, problem.message])
    return line.encode("utf-8", "backslashreplace").decode(
        "utf-8"
    )  # what is no text has been kept as surrogates
