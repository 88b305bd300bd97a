"""How to install what is missing, in the way that fits the installation of iiverl that asks."""

import json
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution


def install_command(*requirements: str, workspace: str | None = None) -> str:
    """Return the command that installs `requirements` beside iiverl.

    In a clone of the repository, where iiverl is installed in editable mode by uv and its environment has no pip, the
    command is `workspace` if it is given, else one of `uv pip`.
    """
    quoted = " ".join(f"'{each}'" if "[" in each or ">" in each else each for each in requirements)
    if in_workspace():
        return workspace or f"uv pip install {quoted}"
    return f"pip install {quoted}"


@cache
def in_workspace() -> bool:
    """Return whether iiverl is installed in editable mode."""
    try:
        origin = distribution("iiverl-core").read_text("direct_url.json")
    except PackageNotFoundError:  # imported from its source, without an installation
        return False
    return bool(json.loads(origin or "{}").get("dir_info", {}).get("editable"))
