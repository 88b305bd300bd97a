"""Write `docs/keys.md` and `docs/metrics.md` from the code: `make reference`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iiverl_core.config.defaults import backend_defaults
from iiverl_core.config.describe import either, expected
from iiverl_core.config.interpolation import reference
from iiverl_core.config.schema import Key, keys, sections
from iiverl_core.config.sections.section import NoEffect, NotYet, OnlyWhen
from iiverl_core.registry import BACKENDS, METRICS

DOCS = Path(__file__).parents[1] / "docs"
KEYS = """\
# Keys

Every key of the YAML file, generated from the code by `make reference`. A default that begins with `=` is another
key's value. The second default is the one under the backend `megatron`, if it differs. `iiverl config show` prints the
values of one file, with the origin of each.
"""
METRICS_HEAD = """\
# Metrics

Every metric that a run logs, generated from the code by `make reference`. `{a,b}` stands for each of the words, and
`{word}` for any text. Metrics of a step are means over the step unless they say otherwise; metrics that a run does not
compute are absent.
"""


def main() -> None:
    """Write both files."""
    for name, text in (("keys.md", keys_page()), ("metrics.md", metrics_page())):
        (DOCS / name).write_text(text, encoding="utf-8")


def keys_page() -> str:
    """Write the keys, one table per section."""
    parts = [KEYS]
    megatron = backend_defaults(BACKENDS["megatron"])
    for path, section in sections().items():
        rows = [key for key in keys().values() if key.path.rpartition(".")[0] == path]
        if rows:
            parts.append(f"## `{path}`\n\n{_first_paragraph(section.__doc__ or '')}\n")
            parts.append(_table(("key", "takes", "default", ""), (_key(key, megatron) for key in rows)))
    return "\n".join(parts)


def metrics_page() -> str:
    """Write the metrics, in the order of their table."""
    rows = ((f"`{m.name}`", m.unit, m.summary, f"`{m.code.replace(':', '.')}`") for m in METRICS.values())
    return "\n".join([METRICS_HEAD, _table(("metric", "unit", "meaning", "computed by"), rows)])


def _key(key: Key, megatron: dict[str, Any]) -> tuple[str, ...]:
    default = _written(key.default)
    other = _written(megatron.get(key.path, key.default))
    shown = default if other == default else f"{default}; {other}"
    notes = [key.description, *filter(None, (_note(mark) for mark in key.marks))]
    return f"`{key.path.rpartition('.')[2]}`", expected(key.field), shown, " ".join(notes)


def _note(mark: NoEffect | NotYet | OnlyWhen) -> str:
    match mark:
        case NoEffect():
            return f"*No effect: {mark.why}.*"
        case NotYet():
            return f"*Not supported in this version: {mark.what.format('this value')}.*"
        case OnlyWhen():
            return f"*Read only with {', or '.join(_conditions(mark))}.*"


def _conditions(mark: OnlyWhen | None) -> Iterator[str]:
    while mark is not None:
        values = [value if isinstance(value, str) else _plain(value) for value in mark.values]
        yield f"`{mark.key}`: {either([*values, *(['a user function'] if mark.custom else [])])}"
        mark = mark.otherwise


def _written(value: Any) -> str:
    followed = reference(value)
    return f"= `{followed}`" if followed else f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    return str(value)


def _first_paragraph(text: str) -> str:
    return " ".join(text.strip().partition("\n\n")[0].split())


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    escaped = ([cell.replace("|", r"\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


if __name__ == "__main__":
    main()
