"""Write the resolved configuration as YAML, with the origin of each value beside it."""

from typing import Any

import yaml

from iiverl_core.config.loading import Loaded, Origin
from iiverl_core.config.schema import keys, shared_sections
from iiverl_core.config.yaml_reader import Loader

MAX_COLUMN = 60
"""Origins are aligned at most at this column; longer lines have them directly behind the value."""


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists, and never uses aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
_Dumper.yaml_implicit_resolvers = {  # quote strings that either reader would read as a number
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
    + Loader.yaml_implicit_resolvers.get(first, [])
    for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | Loader.yaml_implicit_resolvers.keys()
}


def show(loaded: Loaded, *, changed: bool = False, describe: bool = False) -> str:
    """Write the configuration as YAML that loads to the same one.

    `changed` leaves out defaults; `describe` writes the description of each key above it.
    """
    lines: list[tuple[str, Origin | None]] = []
    previous = ""
    for path, key in keys().items():
        origin = loaded.origins[path]
        if changed and origin.kind == "default":
            continue
        *section, name = path.split(".")
        shared = shared_sections(previous, path)
        lines += [("  " * depth + f"{part}:", None) for depth, part in enumerate(section) if depth >= shared]
        previous = path
        indent = "  " * len(section)
        if describe:
            lines.append((f"{indent}# {key.description}", None))
        lines.append((f"{indent}{name}: {written(_escaped(loaded.config.at(path)))}", origin))
    column = min(MAX_COLUMN, max((len(text) for text, origin in lines if origin), default=0))
    return "\n".join(text.ljust(column) + f"  # {origin}" if origin else text for text, origin in lines)


def written(value: Any) -> str:
    """Write a value as YAML on one line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
