"""The command `iiverl report`: the curves and samples of runs as one HTML file."""

from pathlib import Path
from typing import Annotated

import typer

from iiverl_cli.arguments import run_folder
from iiverl_cli.output import clean_exit


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="The folder of a run, and those of others to compare it with."),
    ],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The file to write. [default: RUN/report.html]")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the report while the run goes on, until Ctrl-C.")
    ] = False,
    host: Annotated[
        str,
        typer.Option(
            help="Address to serve at; 0.0.0.0 for other machines, which read it without a password."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve at; 0 for any free one.")] = 8600,
) -> None:
    """Write the curves and samples of a run to one HTML file, which opens without a network.

    A run writes it itself when it ends; this writes it while the run goes on, or with the curves of other runs over its
    own. Samples are those of the first run. With `--serve`, a browser sees new steps as they come.
    """
    with clean_exit():
        from iiverl_core.telemetry.html_report import HTML_REPORT, ReportedRun, write_html_report

        folders = [run_folder(run) for run in runs]
        if serve:
            _serve(folders, host, port)
            return
        path = Path(output).expanduser() if output else folders[0] / HTML_REPORT
        names = distinct_names(folders)
        try:
            size = write_html_report(path, [ReportedRun(name, folder) for name, folder in names.items()])
        except OSError as error:
            raise typer.BadParameter(
                f"{path} cannot be written: {error.strerror}", param_hint="--output"
            ) from error
        typer.echo(f"{path} ({size / 1e6:.1f} MB)")


def _serve(folders: list[Path], host: str, port: int) -> None:
    from iiverl_core.telemetry.html_report import ReportedRun, ReportServer

    runs = [ReportedRun(name, folder) for name, folder in distinct_names(folders).items()]
    try:
        server = ReportServer((host, port), runs)
    except OSError as error:
        raise typer.BadParameter(
            f"{host}:{port}: {error.strerror}; name another one", param_hint="--port"
        ) from error
    with server:
        typer.echo(f"http://{host}:{server.server_port}  (Ctrl-C to end)")
        server.serve_forever()


def distinct_names(folders: list[Path]) -> dict[str, Path]:
    """Name folders by as many of the last parts of their paths as tell them apart."""
    paths = list(dict.fromkeys(folder.absolute() for folder in folders))
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = {"/".join(path.parts[-count:]): path for path in paths}
        if len(names) == len(paths):
            return names
    raise AssertionError("absolute paths differ")
