"""Commands to install missing packages, according to how iiverl itself is installed."""

import json
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution


def install_command(*requirements: str, workspace: str | None = None) -> str:
    """Return the command that installs `requirements` beside iiverl.

    In a clone of the repository, iiverl is installed in editable mode by uv into an environment without pip. There, the
    command is `workspace` or, if that is None, `uv pip install`.
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
    except PackageNotFoundError:  # imported from source, not installed
        return False
    return bool(json.loads(origin or "{}").get("dir_info", {}).get("editable"))
