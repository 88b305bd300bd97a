"""The configuration as a JSON Schema, for editors that complete and check YAML files.

It accepts what a file may hold, and checks names, types and ranges. What several keys mean together is checked by
`iiverl validate` alone.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.fields import FieldInfo

from iiverl_core.config.schema import Key, join, keys, subsection
from iiverl_core.config.sections.root import Config
from iiverl_core.config.sections.section import NoEffect, NotYet, Section
from iiverl_core.config.synonyms import other_names
from iiverl_core.config.verl_keys import VERL_KEYS

Schema = dict[str, Any]
_NOT_HERE = "A section of other versions of verl."
_TYPES = ConfigDict(arbitrary_types_allowed=True)
_NUMBER: Schema = {"type": "string", "pattern": r"^[-+]?[0-9.]+(e[-+]?[0-9]+)?$"}  # as YAML 1.1 reads 1e-6
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_REFERENCE: Schema = {"type": "string", "pattern": r"\$\{"}


def json_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of a configuration file."""
    root = _section(Config, "")
    for name, key in other_names().items():
        _insert(root, name, {"description": f"Another name of {key}."})
    for name, mark in VERL_KEYS.items():
        _insert(root, name, {"description": _unread(mark), "deprecated": True})
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "iiverl", **root}


def _section(section: type[Section], path: str) -> Schema:
    properties: Schema = {}
    for name, field in section.model_fields.items():
        below = subsection(field)
        inner = join(path, name)
        properties[name] = _section(below, inner) if below else _value(keys()[inner])
    return {
        "type": ["object", "null"],
        "description": " ".join((section.__doc__ or "").split()),
        "properties": properties,
        "additionalProperties": False,
    }


def _value(key: Key) -> Schema:
    """Describe a key's value, or a reference to another key in its place."""
    own = _with_bounds(TypeAdapter(_type_of(key.field), config=_TYPES).json_schema())
    definitions = own.pop("$defs", {})
    choices = [own, _REFERENCE]
    if "string" in _types(own):
        choices.append({"type": "number"})  # which becomes a string
    if "number" in _types(own):
        choices.append(_NUMBER)
    schema: Schema = {"anyOf": choices, "description": key.description, "default": key.default}
    if definitions:
        schema["$defs"] = definitions
    marks = [mark for mark in key.marks if isinstance(mark, NoEffect)]
    return schema | ({"deprecated": True} if marks else {})


def _with_bounds(schema: Any) -> Any:
    """Give bounds their names in JSON Schema, which pydantic leaves out where a validator comes before the bound."""
    if isinstance(schema, list):
        return [_with_bounds(each) for each in schema]
    if isinstance(schema, dict):
        return {_BOUNDS.get(name, name): _with_bounds(each) for name, each in schema.items()}
    return schema


def _type_of(field: FieldInfo) -> Any:
    return Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation


def _types(schema: Schema) -> list[str]:
    parts = schema.get("anyOf", [schema])
    return [each["type"] for each in parts if isinstance(each.get("type"), str)]


def _insert(root: Schema, path: str, schema: Schema) -> None:
    """Add a key to the section of its path; sections that only contain such keys accept any others, too."""
    if path.startswith("**."):
        _insert_everywhere(root, path.removeprefix("**."), schema)
        return
    *parents, last = path.split(".")
    section = root
    for name in parents:
        properties: Mapping[str, Schema] = section.get("properties", {})
        if "properties" not in section or "*" in name:
            break
        if name not in properties:
            section["properties"][name] = {
                "description": _NOT_HERE,
                "properties": {},
                "additionalProperties": True,
            }
        section = section["properties"][name]
    if "*" in path and section.get("additionalProperties") is False:
        section["additionalProperties"] = True
    elif "properties" in section and "*" not in path:
        section["properties"].setdefault(last, schema)


def _insert_everywhere(section: Schema, name: str, schema: Schema) -> None:
    for below in section["properties"].values():
        if "properties" in below:
            _insert_everywhere(below, name, schema)
    section["properties"].setdefault(name, schema)


def _unread(mark: NoEffect | NotYet) -> str:
    if isinstance(mark, NoEffect):
        return f"Has no effect: {mark.why}."
    return f"Not supported in this version: {mark.what}."
