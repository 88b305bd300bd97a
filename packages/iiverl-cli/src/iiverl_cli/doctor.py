"""The command `iiverl doctor`: what this machine has for a run."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from iiverl_cli.output import format_table

if TYPE_CHECKING:
    from iiverl_core.doctor import Diagnosis


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Show devices, memory, packages, what is missing and how to install it, and what keeps runs from working.

    Exits with 2 if there is a problem.
    """
    from iiverl_core.doctor import diagnose

    found = diagnose()
    typer.echo(json.dumps(asdict(found), indent=1) if as_json else _text(found))
    if found.problems:
        raise typer.Exit(2)


def _text(found: "Diagnosis") -> str:
    packages = ", ".join(f"{name} {version}" for name, version in found.packages.items())
    usable = {f"{label}s": ", ".join(names) or "none" for label, names in found.usable.items()}
    parts = [format_table([*found.facts.items(), ("packages", packages), *usable.items()])]
    if found.missing:
        parts.append("\n".join(f"{name}: {reason}" for name, reason in found.missing.items()))
    parts += [f"problem: {problem}" for problem in found.problems]
    return "\n\n".join(parts)
