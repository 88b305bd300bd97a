"""Reduce uv.lock to names and versions, so that it works with any mirror.

uv writes the address of every file into its lock. What pins an environment is only the name and the version of
each package, and uv fills in the rest from the index in use on the first `uv sync`. The committed lock therefore
holds no address; `make` calls this after every command that lets uv rewrite the file. Running it twice changes
nothing.
"""

import sys
import tomllib
from pathlib import Path

HEAD = """\
# Names and versions alone: made by `make lock`, completed by `uv sync` from the index in use.
version = {version}
revision = {revision}
requires-python = "{python}"
"""
PACKAGE = """
[[package]]
name = "{name}"
version = "{version}"
source = {{ registry = "index" }}
"""


def slim(text: str) -> str:
    """Return the lock `text` without addresses, hashes and resolved markers; packages sorted by name and version."""
    lock = tomllib.loads(text)
    registry = [p for p in lock["package"] if "registry" in p["source"]]
    pins = sorted({(p["name"], p["version"]) for p in registry})
    head = HEAD.format(version=lock["version"], revision=lock["revision"], python=lock["requires-python"])
    return head + "".join(PACKAGE.format(name=name, version=version) for name, version in pins)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "uv.lock")
    path.write_text(slim(path.read_text()))
