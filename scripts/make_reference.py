"""Write `docs/keys.md`, `docs/metrics.md`, `docs/algorithms.md` and `docs/config.schema.json` from the code: `make reference`."""

import ast
import importlib.util
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from iiverl_core.config.defaults import backend_defaults
from iiverl_core.config.describe import either, expected
from iiverl_core.config.interpolation import reference
from iiverl_core.config.json_schema import json_schema
from iiverl_core.config.schema import Key, keys, sections
from iiverl_core.config.sections.section import NoEffect, NotYet, OnlyWhen
from iiverl_core.config.synonyms import other_names
from iiverl_core.config.verl_keys import VERL_KEYS, Mark
from iiverl_core.registry import AGGREGATIONS, BACKENDS, ESTIMATORS, KL_KINDS, METRICS, POLICY_LOSSES
from iiverl_core.registry.algorithms import AlgorithmInfo, EstimatorInfo, PolicyLossInfo

DOCS = Path(__file__).parents[1] / "docs"
KEYS = """\
# Keys

Every key of the YAML file, generated from the code by `make reference`; for editors,
[config.schema.json](config.schema.json) has the same (`# yaml-language-server: $schema=config.schema.json` in the first
line of a file, with the schema that `iiverl config schema` prints). A default that begins with `=` is another
key's value. The second default is the one under the backend `megatron`, if it differs. `iiverl config show` prints the
values of one file, with the origin of each.
"""
OTHER_NAMES = """\
## Names of other versions of verl

These mean the same, and are accepted in the file and on the command line.

| name | key |
| --- | --- |
"""
UNREAD = """\
## Keys of verl that are not read

Keys of other versions of verl that nothing reads here, by the reason that a run gives if they are set. `*` stands for any
name, `**` for any path. A key with values is silent with one of them; with another, the run has no such feature, and
does not start if it would be a different run without.

| reason | keys | values |
| --- | --- | --- |
"""
METRICS_HEAD = """\
# Metrics

Every metric that a run logs, generated from the code by `make reference`. `{a,b}` stands for each of the words, and
`{word}` for any text. Metrics of a step are means over the step unless they say otherwise; metrics that a run does not
compute are absent.
"""
ALGORITHMS_HEAD = """\
# Algorithms

Every algorithm that a configuration can name, generated from the documentation of its code by `make reference`. The file
of each holds the formula and, below it, the code that computes it; `iiverl algorithms NAME` prints one of them with the
settings that it reads. Your own is a function in a file: [functions.md](functions.md).

A step uses them in this order: an advantage estimator turns the scores of the responses into one number per token; a
policy loss turns that, with log-probs, into a loss per token; and an aggregation turns the losses of all tokens into one.
A divergence from the reference policy is part of the reward (`algorithm.use_kl_in_reward`) or of the loss
(`actor_rollout_ref.actor.use_kl_loss`), or of neither.
"""
_ALGORITHMS = "iiverl_core.algorithms"
KINDS: tuple[tuple[str, str, Iterable[AlgorithmInfo], tuple[str, ...]], ...] = (
    (
        "Advantage estimators",
        "`algorithm.adv_estimator`",
        ESTIMATORS.values(),
        (),
    ),
    (
        "Policy losses",
        "`actor_rollout_ref.actor.policy_loss.loss_mode`",
        POLICY_LOSSES.values(),
        (f"{_ALGORITHMS}.policy_losses.covariance", f"{_ALGORITHMS}.policy_losses.dppo"),
    ),
    (
        "Aggregation of the loss",
        "`actor_rollout_ref.actor.loss_agg_mode`",
        AGGREGATIONS.values(),
        (),
    ),
    (
        "Divergence from the reference",
        "`algorithm.kl_penalty` in the reward, `actor_rollout_ref.actor.kl_loss_type` in the loss",
        KL_KINDS.values(),
        (),
    ),
    (
        "Other parts of the loss",
        "The critic's loss, and `algorithm.rollout_correction`",
        (),
        (f"{_ALGORITHMS}.value_loss", f"{_ALGORITHMS}.rollout_correction"),
    ),
)
"""Title, keys, algorithms, and modules that several of them share."""


def main() -> None:
    """Write all files."""
    for name, text in pages().items():
        (DOCS / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Write the text of each file."""
    schema = json.dumps(json_schema(), ensure_ascii=False, indent=1) + "\n"
    return {
        "keys.md": keys_page(),
        "metrics.md": metrics_page(),
        "algorithms.md": algorithms_page(),
        "config.schema.json": schema,
    }


def algorithms_page() -> str:
    """Write the algorithms by kind: a table, then the documentation of each module."""
    parts = [ALGORITHMS_HEAD]
    for title, named_by, infos, shared in KINDS:
        parts.append(f"## {title}\n\nNamed by: {named_by}\n" if infos else f"## {title}\n\n{named_by}.\n")
        if infos:
            rows = ((", ".join(f"`{n}`" for n in i.names), _needs(i), i.summary) for i in infos)
            parts.append(_table(("name", "needs", ""), rows))
        by_text: dict[str, list[str]] = defaultdict(list)
        for info in infos:
            by_text[info.documentation].append(info.name)
        for module in shared:
            by_text[_documentation(module)].append(module.rpartition(".")[2])
        for text, names in by_text.items():
            heading = "" if len(names) > 1 else f"### {names[0]}\n\n"
            parts.append(f"{heading}{text}\n")
    return "\n".join(parts)


def _needs(info: AlgorithmInfo) -> str:
    match info:
        case EstimatorInfo(needs_critic=True):
            return "a critic"
        case EstimatorInfo(greedy_baseline=True):
            return "a greedy response"
        case EstimatorInfo(min_group_size=size) if size > 1:
            return f"`rollout.n` ≥ {size}"
        case PolicyLossInfo(loss_agg_mode=str(mode)):
            return f"`{mode}`, always"
    return ""


def _documentation(module: str) -> str:
    """Read the docstring of a module without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def keys_page() -> str:
    """Write the keys, one table per section."""
    parts = [KEYS]
    megatron = backend_defaults(BACKENDS["megatron"])
    for path, section in sections().items():
        rows = [key for key in keys().values() if key.path.rpartition(".")[0] == path]
        if rows:
            parts.append(f"## `{path}`\n\n{_first_paragraph(section.__doc__ or '')}\n")
            parts.append(_table(("key", "takes", "default", ""), (_key(key, megatron) for key in rows)))
    parts.append(OTHER_NAMES + "".join(f"| `{name}` | `{key}` |\n" for name, key in other_names().items()))
    parts.append(UNREAD + "".join(_unread()))
    return "\n".join(parts)


def _unread() -> Iterator[str]:
    """Write the keys of verl that nothing reads, one row per reason and values."""
    by_mark: dict[Mark, list[str]] = defaultdict(list)
    for path, mark in VERL_KEYS.items():
        by_mark[_hashable(mark)].append(path)
    for mark, paths in by_mark.items():
        names = ", ".join(f"`{name}`" for name in _joined(paths))
        match mark:
            case NoEffect(why):
                yield f"| {why} | {names} | |\n"
            case NotYet(what, ready, blocks):
                values = either([_plain(value) for value in ready]) if ready else "none"
                yield f"| not supported{'' if blocks else ', and ignored'}: {what} | {names} | {values} |\n"


def _hashable(mark: Mark) -> Mark:
    return (
        NotYet(mark.what, tuple(_plain(v) for v in mark.ready), mark.blocks)
        if isinstance(mark, NotYet)
        else mark
    )


def _joined(paths: Iterable[str]) -> list[str]:
    """Write the same key of several models as one: `{critic,reward_model}.rollout_n`."""
    by_tail: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        head, _, tail = path.removeprefix("actor_rollout_ref.").partition(".")
        by_tail[tail].append(head)
    heads_of = {tail: list(dict.fromkeys(heads)) for tail, heads in by_tail.items()}
    return [
        (f"{{{','.join(heads)}}}" if len(heads) > 1 else heads[0]) + (f".{tail}" if tail else "")
        for tail, heads in heads_of.items()
    ]


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
