"""YAML as a person writes it: sections in their order, and texts of several lines as blocks."""

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def documents(comment: str, *values: Any) -> str:
    """Write values as the documents of one file, below a comment of one or more lines."""
    head = "".join(f"# {line}\n" for line in comment.splitlines())
    return head + yaml.dump_all(values, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)
