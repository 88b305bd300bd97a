"""Arguments of commands: a configuration, which a function loads, and the folder of a run."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from iiverl_cli.verl_command import without_launcher

if TYPE_CHECKING:
    from iiverl_core.config import Loaded

KEY = re.compile(r"[+~]*[a-z_][\w.]*=")  # in front of a value, which may be a file

ConfigFile = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG",
        help="The YAML file; without one, the overrides are the whole configuration.",
        show_default=False,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Values that override the file's, such as trainer.total_epochs=1. A command line of verl's main_ppo can be "
        "pasted here.",
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


class ConfigCommand(TyperCommand):
    """A command that reads a configuration, and accepts what starts verl's trainer in front of its overrides."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments."""
        return super().parse_args(ctx, without_launcher(args))


def run_folder(name: str) -> Path:
    """Return the folder of a run; raises BadParameter if it is none."""
    from iiverl_core.telemetry import METRICS_FILE

    folder = Path(name).expanduser()
    if not (folder / METRICS_FILE).is_file():
        hint = f"{name} has no {METRICS_FILE}; `iiverl runs DIR` lists the folders of runs"
        raise typer.BadParameter(hint, param_hint="RUN")
    return folder


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

    file, words = split_arguments(config, overrides, config_path)
    return load(file, words, backend, allow_unknown=allow_unknown)


def split_arguments(
    config: str | None, overrides: list[str] | None, config_path: str | None
) -> tuple[str | None, list[str]]:
    """Return the YAML file and the overrides that a command's arguments name; None for the file if there is none."""
    overrides = list(overrides or ())
    if config is not None and (config_path is not None or _is_override(config)):
        overrides.insert(0, config)
        config = None
    file = config_path or config
    if not file and not overrides:
        raise typer.BadParameter("name the YAML file, as in: iiverl train-ppo run.yaml", param_hint="CONFIG")
    if not file and any(_is_file(word) for word in overrides):
        raise typer.BadParameter(f"the YAML file comes before {overrides[0]}", param_hint="CONFIG")
    return file, overrides


def _is_override(word: str) -> bool:
    return not _is_file(word) and ("=" in word or word.startswith(("~", "+")))


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) and not KEY.match(word)
