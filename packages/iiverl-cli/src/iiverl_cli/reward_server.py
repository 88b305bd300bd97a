"""The command `iiverl reward-server`: the command line of `iiverl_reward_client.server`, which reads the arguments."""

import typer

from iiverl_core.installation import install_command

# The arguments, --help among them, belong to the other parser.
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def reward_server(context: typer.Context) -> None:
    """Score responses over HTTP."""
    from iiverl_reward_client.server.command import main  # brings httpx, which other commands start without

    install = install_command("iiverl[reward-server]", workspace="make setup")
    raise typer.Exit(main(context.args, program="iiverl reward-server", install=install))
