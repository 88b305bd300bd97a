"""Arguments of the commands that read a configuration, and the function that loads it."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from iiverl_core.config import Loaded

ConfigFile = Annotated[
    str | None, typer.Argument(metavar="CONFIG", help="The YAML file.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Values that override the file's, such as trainer.total_epochs=1.",
        show_default=False,
    ),
]
ConfigPath = Annotated[
    str | None,
    typer.Option(
        "--config_path", "--config-path", metavar="CONFIG", help="The YAML file, instead of CONFIG."
    ),
]
Backend = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Training backend, such as fsdp or megatron. Default: the actor's `strategy` in the file, or fsdp.",
    ),
]
AllowUnknown = Annotated[
    bool,
    typer.Option(
        "--allow-unknown", help="Warn about unknown keys, such as those of later versions, and ignore them."
    ),
]


def load_config(
    config: str | None,
    overrides: list[str] | None,
    config_path: str | None,
    backend: str | None,
    *,
    allow_unknown: bool,
) -> "Loaded":
    """Load the configuration that a command's arguments name."""
    from iiverl_core.config import load

    overrides = list(overrides or ())
    if config_path is not None and config is not None:
        overrides.insert(0, config)
    file = config_path or config
    if not file:
        raise typer.BadParameter("name the YAML file, as in: iiverl train-ppo run.yaml", param_hint="CONFIG")
    if "=" in file and not file.endswith((".yaml", ".yml")):
        raise typer.BadParameter(f"the YAML file comes before {file}", param_hint="CONFIG")
    return load(file, overrides, backend, allow_unknown=allow_unknown)
