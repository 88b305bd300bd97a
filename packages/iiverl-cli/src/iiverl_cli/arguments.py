"""Arguments of commands: a configuration, which a function loads, and the folder of a run."""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from iiverl_core.config import Loaded

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
        return super().parse_args(ctx, _without_launcher(args))


def _without_launcher(args: list[str]) -> list[str]:
    """Take `python3 -m verl.trainer.main_ppo` and its options out of a command line.

    Variables that are set in front of it are set in this process. Of Hydra's options, `--config-name` names a YAML file
    or selects verl's defaults of a backend.
    """
    pairs = pairwise(args)
    start = next(
        (i for i, (flag, name) in enumerate(pairs) if flag == "-m" and LAUNCHER.fullmatch(name)), None
    )
    if start is None:
        return args
    before, after = args[:start], args[start + 2 :]
    python = next((i for i, word in enumerate(before) if PYTHON.fullmatch(word)), len(before))
    before = before[:python]  # what follows are options of Python
    while before and (variable := VARIABLE.fullmatch(before[-1])):
        os.environ[variable[1]] = variable[2]
        before.pop()
    options: dict[str, str] = {}
    overrides: list[str] = []
    words = iter(after)
    for word in words:
        option = HYDRA_OPTION.fullmatch(word)
        if option:
            options[option[1]] = option[2] if option[2] is not None else next(words, "")
        else:
            overrides.append(word)
    name = options.get("name", "").removesuffix(".yaml")
    file = os.path.join(options.get("path", ""), f"{name}.yaml")  # noqa: PTH118  (relative names stay relative)
    if name and os.path.isfile(file):  # noqa: PTH113
        return [*before, file, *overrides]
    if name and not VERL_DEFAULTS.fullmatch(name):
        raise typer.BadParameter(f"there is no file {file}", param_hint="--config-name")
    backend = ["--backend", "megatron"] if "megatron" in name else []
    return [*before, *backend, *overrides]


LAUNCHER = re.compile(r"verl\.[\w.]*main_ppo")
PYTHON = re.compile(r"(.*/)?python[\d.]*")
VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
HYDRA_OPTION = re.compile(r"--config-(name|path|dir)(?:=(.*))?", re.DOTALL)
VERL_DEFAULTS = re.compile(r"ppo_(megatron_)?trainer")


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

    overrides = list(overrides or ())
    if config is not None and (config_path is not None or _is_override(config)):
        overrides.insert(0, config)
        config = None
    file = config_path or config
    if not file and not overrides:
        raise typer.BadParameter("name the YAML file, as in: iiverl train-ppo run.yaml", param_hint="CONFIG")
    if not file and any(_is_file(word) for word in overrides):
        raise typer.BadParameter(f"the YAML file comes before {overrides[0]}", param_hint="CONFIG")
    return load(file, overrides, backend, allow_unknown=allow_unknown)


def _is_override(word: str) -> bool:
    return not _is_file(word) and ("=" in word or word.startswith(("~", "+")))


def _is_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))
