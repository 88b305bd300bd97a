"""Read the text of a YAML file into plain values, with the line of each."""

import re
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import yaml

from iiverl_core.config.diagnostics import Problem

NodePath: TypeAlias = tuple[str | int, ...]

INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)$")
FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))$"
    r"|\.(?:nan|NaN|NAN)$"
)
TAG = "tag:yaml.org,2002:"
MERGE = TAG + "merge"

SENTENCES = (
    ("found character '\\t'", "a tab indents this line; indent with spaces"),
    ("mapping values are not allowed here", "unexpected ':'; the line above lacks one, the indentation is wrong, or the value needs quotes"),
    ("found undefined alias", "an alias (*) refers to an anchor (&) that is not defined above it"),
    ("could not find expected ':'", "this line has no ': ' between key and value"),
    ("expected <block end>", "the indentation of this line does not match the lines above it"),
    ("found unexpected end of stream", "the quote opened here is never closed"),
    ("expected ',' or ']'", "the '[' opened here is never closed"),
    ("expected ',' or '}'", "the '{' opened here is never closed"),
    ("expected the node content", "a value is missing, or begins with a character that needs quotes"),
    ("cannot start any token", "a value begins with a character that needs quotes"),
    ("but found another document", "'---' begins a second document; a configuration has only one"),
)  # fmt: skip
AT_THE_OPENING = ("could not find expected ':'", "found unexpected end of stream", "expected ',' or")


class Unreadable:
    """Stands for a value that could not be read; the problem is already reported."""


@dataclass
class ParsedYaml:
    """Values of a YAML file, the line of each key and list item by its path, and the problems of the text."""

    values: Any = None
    lines: dict[NodePath, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class Loader(yaml.SafeLoader):
    """YAML as researchers write it: `1e-6` is a number, `2024-01-01`, `1:30` and `007` are strings."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own class attribute
        first: [
            (tag, pattern)
            for tag, pattern in resolvers
            if tag.rpartition(":")[2] in ("bool", "null", "merge")
        ]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


Loader.add_implicit_resolver(TAG + "int", INT, list("-+0123456789"))
Loader.add_implicit_resolver(TAG + "float", FLOAT, list("-+.0123456789"))


def read_yaml(text: str, file: str) -> ParsedYaml:
    """Read one YAML document. Raises nothing: problems are in `problems`."""
    source = ParsedYaml()
    try:
        root = yaml.compose(text, Loader=Loader)
        if root is not None:
            source.values = _Reader(source, file).value(root, ())
    except yaml.MarkedYAMLError as error:
        source.problems.append(_marked(error, file))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"the character U+{ord(text[error.position]):04X} is not allowed; write it as an escape in double quotes"
        source.problems.append(_syntax(f"not valid YAML: {message}", file, line))
    except RecursionError:
        source.problems.append(_syntax("the values are nested too deeply", file))
    return source


def _syntax(message: str, file: str, line: int | None = None) -> Problem:
    return Problem("C002", "error", "", message, file, line)


def _marked(error: yaml.MarkedYAMLError, file: str) -> Problem:
    problem = error.problem or error.context or "it cannot be parsed"
    message = next((sentence for sign, sentence in SENTENCES if sign in problem), problem)
    mark = error.problem_mark or error.context_mark
    if error.context_mark and problem.startswith(AT_THE_OPENING):
        mark = error.context_mark
    return _syntax(f"not valid YAML: {message}", file, mark.line + 1 if mark else None)


class _Reader:
    """Builds plain values from YAML nodes."""

    def __init__(self, source: ParsedYaml, file: str) -> None:
        self.source = source
        self.file = file
        self.open: set[int] = set()

    def value(self, node: yaml.Node, path: NodePath) -> Any:
        self.source.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if id(node) in self.open:
            return self.report(node, path, "this value contains itself through an alias")
        self.open.add(id(node))
        if isinstance(node, yaml.MappingNode):
            value: Any = self.mapping(node, path)
        else:
            value = [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
        self.open.discard(id(node))
        return value

    def scalar(self, node: yaml.ScalarNode, path: NodePath) -> Any:
        text, tag = node.value, node.tag.removeprefix(TAG)
        try:
            match tag:
                case "null":
                    return None
                case "bool":
                    return text.lower() in ("true", "yes", "on")
                case "int":
                    return int(text.replace("_", ""), 0)
                case "float":
                    return float(re.sub(r"\.(?=inf|nan)", "", text.replace("_", "").lower()))
                case "str" | "value":
                    return text
        except ValueError:
            return self.report(node, path, f"{text[:40]!r} cannot be read as {tag}")
        return self.report(node, path, f"the tag {node.tag} is not supported; write a plain value")

    def mapping(self, node: yaml.MappingNode, path: NodePath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == MERGE:  # before the others, which override merged values
                self.merge(value_node, path, values)
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            if key_node.tag == MERGE:
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.report(key_node, path, "a key has to be a string, not a list or a section")
                continue
            key = key_node.value
            if key in first:
                message = f"this key is set twice; the first time on line {first[key]}"
                self.report(key_node, (*path, key), message, "C004")
                continue
            first[key] = self.source.lines[*path, key] = key_node.start_mark.line + 1
            values[key] = self.value(value_node, (*path, key))
        return values

    def merge(self, node: yaml.Node, path: NodePath, values: dict[str, Any]) -> None:
        for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            merged = self.value(item, path)
            if isinstance(merged, dict):
                values.update({key: value for key, value in merged.items() if key not in values})
            elif not isinstance(merged, Unreadable):
                self.report(item, path, "'<<' has to be followed by a section")

    def report(self, node: yaml.Node, path: NodePath, message: str, code: str = "C003") -> Unreadable:
        key = ".".join(map(str, path))
        self.source.problems.append(Problem(code, "error", key, message, self.file, node.start_mark.line + 1))
        return Unreadable()
