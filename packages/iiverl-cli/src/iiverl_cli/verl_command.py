"""Command lines of verl's trainer, pasted or in a shell script."""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import typer

LAUNCHER = re.compile(r"verl\.[\w.]*main_ppo")
PYTHON = re.compile(r"(.*/)?python[\d.]*")
VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
HYDRA_OPTION = re.compile(r"--config-(name|path|dir)(?:=(.*))?", re.DOTALL)
VERL_DEFAULTS = re.compile(r"ppo_(megatron_)?trainer")

SHELL_TIMEOUT_S = 10
WORD, END = "\1", "\2"
NO_PROGRAMS = r"""
# In a restricted shell that finds no program, every command ends up here. Others than the trainer pass on what they read.
command_not_found_handle() {
    local rest
    if [[ "$*" == *verl.*main_ppo* ]]; then printf '\1%s' "$@"; printf '\2'
    else while IFS= read -r -d '' rest; do printf '%s\0' "$rest"; done; printf '%s' "$rest"; fi
}
cd() { :; }; source() { :; }; .() { :; }; ulimit() { :; }; exec() { "$@"; }
set() { if [[ $1 == -- ]]; then builtin set "$@"; fi; }
"""
TO_A_FILE = re.compile(r"(?<![<>\w$])(?:[0-9]|&)?>{1,2}\s*[^\s;|&()>]+")
WITH_FOLDER = re.compile(r"(?<![\w/=\"'.])[\w./~-]*/(python[\d.]*)(?=\s)")


def without_launcher(args: list[str]) -> list[str]:
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


def commands_of_script(script: Path, arguments: Sequence[str]) -> list[list[str]]:
    """Return the command lines by which a shell script starts verl's trainer, from `-m verl.trainer.main_ppo` on.

    A restricted bash that finds no program expands its variables and arrays; nothing that the script names is run, and
    no file is written. `arguments` are those of the script.

    Raises:
        BadParameter: the script cannot be read, or starts no trainer of verl.
    """
    try:
        text = script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text in UTF-8"
        raise typer.BadParameter(f"cannot read {script}: {reason}", param_hint="COMMAND") from error
    text = WITH_FOLDER.sub(r"\1", text)
    # A restricted shell refuses to write to files, and so to run what is redirected to one.
    found = _expanded(text, arguments) or _expanded(TO_A_FILE.sub("", text), arguments)
    if not found:
        raise typer.BadParameter(
            f"{script} does not start verl's trainer (python3 -m verl.trainer.main_ppo …), or only after a command that "
            "was not run; paste its command line instead",
            param_hint="COMMAND",
        )
    return found


def _expanded(text: str, arguments: Sequence[str]) -> list[list[str]]:
    environment = {name: value for name, value in os.environ.items() if name not in ("BASH_ENV", "ENV")}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "script.sh"
        file.write_text(NO_PROGRAMS + text, encoding="utf-8")
        try:
            done = subprocess.run(
                ["/bin/bash", "--restricted", "--norc", file, *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env={**environment, "PATH": folder},
                timeout=SHELL_TIMEOUT_S,
                check=False,
            )
            output = done.stdout
        except subprocess.TimeoutExpired as error:  # it waits for a program
            output = error.stdout or b""
        except OSError as error:
            raise typer.BadParameter(f"needs bash to read a script: {error}", param_hint="COMMAND") from error
    return [
        _command(match) for match in re.findall(f"{WORD}([^{END}]*){END}", output.decode("utf-8", "replace"))
    ]


def _command(words: str) -> list[str]:
    command = words.split(WORD)
    return command[next((i for i, word in enumerate(command) if word == "-m"), 0) :]
