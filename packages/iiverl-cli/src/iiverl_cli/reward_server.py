"""The command `iiverl reward-server`."""

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

from iiverl_cli.interruption import clean_exit

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "math_verify")


def reward_server(
    host: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Address to listen on; by default this machine alone."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on; by default 8000.")
    ] = None,
    env_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with settings; by default .env, where there is one."),
    ] = None,
    verifier: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE.py:FUNCTION",
            help="A verifier of your own; its name is the type that it verifies. May be given several times.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of each type; by default as many as cores, up to 4.")
    ] = None,
) -> None:
    """Score responses over HTTP."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        typer.echo(
            f"error: the reward server needs {', '.join(missing)}. Install it: pip install 'iiverl[reward-server]'",
            err=True,
        )
        raise typer.Exit(2)
    with clean_exit():
        from iiverl_reward_client.server import SettingsError, load_settings, serve

        given: dict[str, Any] = {"bind_host": host, "bind_port": port, "workers": workers}
        try:
            settings = load_settings(env_file).model_copy(
                update={name: value for name, value in given.items() if value is not None}
            )
            serve(settings, verifier or (), tell=lambda line: typer.echo(line, err=True))
        except SettingsError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
