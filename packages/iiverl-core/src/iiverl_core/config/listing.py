"""The resolved configuration as YAML, with the origin of each value beside it."""

from typing import Any

import yaml

from iiverl_core.config.loading import Loaded, Origin
from iiverl_core.config.schema import keys, shared_sections
from iiverl_core.config.source import Loader

WIDEST = 60
"""Column up to which origins are aligned; longer lines have theirs right behind them."""


class _Dumper(yaml.SafeDumper):
    """Writes tuples as lists, and values whole wherever they stand."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)
_Dumper.yaml_implicit_resolvers = {  # so that a string is quoted where either reader would see a number in it
    first: yaml.SafeDumper.yaml_implicit_resolvers.get(first, [])
    + Loader.yaml_implicit_resolvers.get(first, [])
    for first in yaml.SafeDumper.yaml_implicit_resolvers.keys() | Loader.yaml_implicit_resolvers.keys()
}


def show(loaded: Loaded, *, changed: bool = False, describe: bool = False) -> str:
    """Write the whole configuration as YAML that loads to the same one.

    `changed` leaves out what is a default; `describe` puts each key's description above it.
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
        lines.append((f"{indent}{name}: {_written(_value(loaded, path))}", origin))
    column = min(WIDEST, max((len(text) for text, origin in lines if origin), default=0))
    return "\n".join(text.ljust(column) + f"  # {origin}" if origin else text for text, origin in lines)


def _value(loaded: Loaded, path: str) -> Any:
    value: Any = loaded.config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _written(value: Any) -> str:
    text = yaml.dump(
        _escaped(value), Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True
    )
    return text.removesuffix("\n").removesuffix("\n...")


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
