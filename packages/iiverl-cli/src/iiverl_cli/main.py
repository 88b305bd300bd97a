"""The command `iiverl`: parse arguments, load the configuration, and call the core.

Heavy packages are imported only once the configuration is known to be valid.
"""

import importlib.metadata
from typing import Annotated

import typer

from iiverl_cli.algorithms import algorithms
from iiverl_cli.arguments import (
    AllowUnknown,
    Backend,
    ConfigCommand,
    ConfigFile,
    ConfigPath,
    Overrides,
    load_config,
)
from iiverl_cli.convert import ConvertCommand, convert
from iiverl_cli.diff import diff
from iiverl_cli.doctor import doctor
from iiverl_cli.export import export
from iiverl_cli.launch import launch_app
from iiverl_cli.output import EXIT_REFUSED, clean_exit, report_problems
from iiverl_cli.plan import plan
from iiverl_cli.replay import replay
from iiverl_cli.report import report
from iiverl_cli.reward import reward_app
from iiverl_cli.runs import runs
from iiverl_core.installation import install_command

EXIT_UNSUPPORTED = 3
"""The configuration is valid, but this version or this machine cannot run it."""

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="iiverl",
    help="Reinforcement learning for language models from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings=HELP,
)
config_app = typer.Typer(help="Show a configuration.", no_args_is_help=True, context_settings=HELP)
app.add_typer(config_app, name="config")
app.command("plan", cls=ConfigCommand)(plan)
app.command("convert", cls=ConvertCommand)(convert)
app.command("algorithms")(algorithms)
app.command("doctor")(doctor)
app.command("runs")(runs)
app.command("report")(report)
app.command("diff")(diff)
app.command("replay")(replay)
app.command("export")(export)
app.add_typer(launch_app, name="launch")
app.add_typer(reward_app, name="reward")


def main() -> None:
    """Run the command line."""
    app()


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"iiverl {importlib.metadata.version('iiverl-cli')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command(cls=ConfigCommand)
def train_ppo(
    config: ConfigFile = None,
    overrides: Overrides = None,
    config_path: ConfigPath = None,
    backend: Backend = None,
    allow_unknown: AllowUnknown = False,
) -> None:
    """Train with PPO, GRPO or a related algorithm."""
    loaded = load_config(config, overrides, config_path, backend, allow_unknown=allow_unknown)
    report_problems(loaded.problems, running=True)
    if loaded.obstacles:
        raise typer.Exit(EXIT_REFUSED if loaded.refused else EXIT_UNSUPPORTED)
    from iiverl_core.stopping import Stop

    stop = Stop()
    with clean_exit(stop, loaded.run.trainer.grace_seconds):
        from iiverl_core.controller import train

        train(loaded, stop)


@app.command(cls=ConfigCommand)
def validate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    config_path: ConfigPath = None,
    backend: Backend = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also import your code, query the reward server, and read and tokenize the datasets, as a run does "
            "before it starts its workers. Your functions are not called.",
        ),
    ] = False,
    allow_unknown: AllowUnknown = False,
) -> None:
    """Check a configuration and the files that it names, without running it.

    Exits with 0 if it can run here; with 2 if the configuration or a file that it names has to be fixed; with 3 if both
    are valid, but this version or this machine cannot run them.
    """
    loaded = load_config(config, overrides, config_path, backend, allow_unknown=allow_unknown)
    report_problems(loaded.problems)
    refused = len(loaded.refused)
    others = len(loaded.problems) - refused
    if refused:
        typer.echo(
            f"{loaded.path} is not valid: {_count(refused, 'error')}, {_count(others, 'warning')}", err=True
        )
        raise typer.Exit(EXIT_REFUSED)
    if deep:
        with clean_exit():
            from iiverl_core.controller import prepare

            prepare(loaded)
    obstacles = len(loaded.obstacles)
    with_warnings = f", with {_count(others, 'warning')}" if others else ""
    here = f"; {obstacles} of them keep{'s' * (obstacles == 1)} it from running here" if obstacles else ""
    typer.echo(f"{loaded.path} is valid{with_warnings}{here}")
    if obstacles:
        raise typer.Exit(EXIT_UNSUPPORTED)


@config_app.command("show", cls=ConfigCommand)
def show_config(
    config: ConfigFile = None,
    overrides: Overrides = None,
    config_path: ConfigPath = None,
    backend: Backend = None,
    allow_unknown: AllowUnknown = False,
    changed: Annotated[bool, typer.Option("--changed", help="Omit defaults.")] = False,
    describe: Annotated[
        bool, typer.Option("--describe", help="Put each key's description above it.")
    ] = False,
) -> None:
    """Print the whole configuration as YAML, and where each value comes from.

    If the file is invalid, defaults replace invalid values, and the exit code is 2.
    """
    from iiverl_core.config import show

    loaded = load_config(config, overrides, config_path, backend, allow_unknown=allow_unknown)
    if loaded.is_read:
        typer.echo(show(loaded, changed=changed, describe=describe))
    report_problems(loaded.problems)
    if loaded.errors:
        raise typer.Exit(2)


@config_app.command("schema")
def show_schema() -> None:
    """Print the JSON Schema of configuration files, with which editors complete and check them."""
    import json

    from iiverl_core.config.json_schema import json_schema

    typer.echo(json.dumps(json_schema(), ensure_ascii=False, indent=1))


# The arguments, --help included, are parsed by the server's own command line.
@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
)
def reward_server(context: typer.Context) -> None:
    """Score responses over HTTP."""
    from iiverl_reward_client.server.command import main  # imports httpx

    install = install_command("iiverl[reward-server]", workspace="make setup")
    raise typer.Exit(main(context.args, program="iiverl reward-server", install=install))


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
