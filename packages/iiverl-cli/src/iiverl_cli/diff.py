"""The command `iiverl diff`: where two runs begin to differ."""

from typing import TYPE_CHECKING, Annotated

import typer

from iiverl_cli.arguments import run_folder
from iiverl_cli.output import clean_exit

if TYPE_CHECKING:
    from iiverl_core.controller.run_diff import Compared

EXIT_DIFFERENT = 1


def diff(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The folder of a run.")],
    other: Annotated[str, typer.Argument(metavar="OTHER", help="The folder of the other run.")],
) -> None:
    """Compare two runs: configurations, and the first step whose metrics, samples or saved tensors differ.

    Results are compared bit by bit; times and memory are left out. Exits with 1 if results differ.
    """
    with clean_exit():
        from iiverl_core.controller.run_diff import diff_runs

        found = diff_runs(run_folder(run), run_folder(other), lambda what: typer.echo(what, err=True))
        if found.configuration is None:
            typer.echo("configuration: not compared, since one of the runs did not record it")
        else:
            typer.echo(f"configuration: {'different' if found.configuration else 'equal'}")
            for line in found.configuration:
                typer.echo(f"  {line}")
        for compared in found.results:
            _print(compared)
    if not all(compared.equal for compared in found.results):
        raise typer.Exit(EXIT_DIFFERENT)


def _print(compared: "Compared") -> None:
    steps = f"{compared.count} step{'s' * (compared.count != 1)}"
    if not compared.count:
        state = "the runs have no step in common"
    elif compared.equal:
        state = f"equal in {steps}"
    else:
        state = f"different from {compared.place} on, of {steps}"
    typer.echo(f"{compared.kind}: {state}")
    for line in compared.different:
        typer.echo(f"  {line}")
    if compared.others:
        typer.echo(f"  and {compared.others} others")
    if compared.only:
        typer.echo(f"  only in one of the runs: {', '.join(compared.only)}")
