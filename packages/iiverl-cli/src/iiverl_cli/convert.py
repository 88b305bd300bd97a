"""The command `iiverl convert`: a configuration of verl as one of iiverl."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iiverl_cli.arguments import ConfigCommand, split_arguments
from iiverl_cli.output import EXIT_REFUSED, clean_exit, report_problems
from iiverl_cli.verl_command import commands_of_script, without_launcher

if TYPE_CHECKING:
    from iiverl_core.config.convert import Conversion


class ConvertCommand(ConfigCommand):
    """A command that takes a shell script in place of a pasted command line."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        """Parse the arguments."""
        scripts = [i for i, word in enumerate(args) if word.endswith((".sh", ".bash"))]
        if scripts:
            before, script, after = args[: scripts[0]], args[scripts[0]], args[scripts[0] + 1 :]
            ctx.meta["source"] = script
            commands = commands_of_script(Path(script).expanduser(), after)
            if len(commands) > 1:
                typer.echo(f"{script} starts {len(commands)} runs; this is the first", err=True)
            args = [*before, *without_launcher(commands[0])]
        return super().parse_args(ctx, args)


def convert(
    ctx: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(
            metavar="COMMAND",
            help="A YAML file of verl, a shell script (.sh) with its arguments, or the command line itself.",
            show_default=False,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file to write, instead of the terminal."),
    ] = None,
    backend: Annotated[str | None, typer.Option(hidden=True)] = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Omit values that are defaults here, as of a dump of Hydra's.")
    ] = False,
) -> None:
    """Write a configuration or a command line of verl as a YAML file of iiverl, and list what is left out.

    A script is read by a restricted shell that runs none of its programs. Options come before COMMAND. Exits with 2 if
    the values contradict each other here.
    """
    with clean_exit():
        from iiverl_core.config.convert import convert as convert_values

        file, words = split_arguments(config, overrides, None)
        source = ctx.meta.get("source") or file or "a command line of verl"
        found = convert_values(
            file, words, backend, source=source, name=str(output or "converted.yaml"), changed=changed
        )
        if output is None:
            typer.echo(found.text, nl=False)
        else:
            output.write_text(found.text, encoding="utf-8")
    _report(found, output)


def _report(found: "Conversion", output: Path | None) -> None:
    for reason, paths in found.unsupported.items():
        typer.echo(f"left out, so that the run is another one: {', '.join(paths)}: {reason}", err=True)
    unread = sum(map(len, found.unread.values()))
    if unread:
        typer.echo(f"left out, because nothing reads them: {unread} keys, listed in the file", err=True)
    report_problems(found.loaded.errors)
    if found.loaded.errors:
        raise typer.Exit(EXIT_REFUSED)
    if output is not None:
        typer.echo(f"next: iiverl validate {output}", err=True)
