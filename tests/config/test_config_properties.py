"""Whatever a file holds, loading answers; and what is wrong is reported at its line."""

import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.config import load, render
from iiverl_core.config.schema import keys
from iiverl_core.config.suggest import suggest

PATHS = sorted(keys())
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            "${data.seed}",
            "${trainer}",
            "x${data.seed}y",
            "${",
            "${a.b}",
            "~",
            "1e-6",
            "grpo",
            "hf",
            "own.py:f",
        ]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def loaded(text: str | bytes, *overrides: str, backend: str | None = None):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "replace"))
        return load(file, overrides, backend)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        *sections, name = path.split(".")
        at = tree
        for section in sections:
            at = at.setdefault(section, {})
        at[name] = value
    return tree


@given(st.binary() | st.text() | st.text(alphabet="data: {}[]&*!<>|\"'#-\n\t%@,?", max_size=60))
def test_any_bytes_are_answered(content: str | bytes) -> None:
    assert isinstance(render(loaded(content).problems), str)


@given(
    st.dictionaries(st.sampled_from(PATHS), VALUES, max_size=12),
    st.sampled_from([None, "fsdp", "megatron", "x"]),
)
def test_any_values_are_answered(values: dict[str, Any], backend: str | None) -> None:
    text = yaml.safe_dump(nested(values), allow_unicode=True)
    answer = loaded(text, backend=backend)
    render(answer.problems, running=True)
    numbered = [problem.line for problem in answer.problems if problem.line]
    assert numbered == sorted(numbered)
    assert all(line <= len(text.splitlines()) + 1 for line in numbered)


@given(st.lists(st.text(max_size=20) | st.sampled_from([f"{path}=[1" for path in PATHS]), max_size=3))
def test_any_overrides_are_answered(overrides: list[str]) -> None:
    render(loaded("", *overrides).problems)


@given(st.sampled_from(PATHS), st.integers(0, 4), st.lists(st.sampled_from(PATHS), max_size=4, unique=True))
def test_a_wrong_type_is_told_at_its_line(path: str, blank: int, others: list[str]) -> None:
    takes_sections = isinstance(keys()[path].default, dict)
    wrong: Any = "word" if takes_sections else {"a": [1]}
    right = [other for other in others if other != path]
    text = "# comment\n" * blank
    text += yaml.safe_dump(nested({**dict.fromkeys(right, "${data.seed}"), path: wrong}), sort_keys=False)
    name = path.rpartition(".")[2]
    reported = [p for p in loaded(text).problems if p.key == path and p.severity == "error"]
    assert len(reported) == 1
    assert reported[0].line is not None
    assert text.splitlines()[reported[0].line - 1].strip().startswith(f"{name}:")
    assert "expected" in reported[0].message


@given(st.sampled_from(PATHS), st.integers(0, 40))
def test_a_letter_left_out_is_told_at_its_line(path: str, at: int) -> None:
    section, _, name = path.rpartition(".")
    at %= len(name)
    typo = f"{section}.{name[:at]}{name[at + 1 :]}"
    if typo in PATHS or typo.endswith("."):
        return
    reported = [p for p in loaded(yaml.safe_dump(nested({typo: 1}))).errors if p.key == typo]
    assert len(reported) == 1
    assert reported[0].message.startswith("unknown key")
    assert reported[0].line == typo.count(".") + 1


def test_most_typos_of_one_letter_are_recognised() -> None:
    tried = right = 0
    for path in PATHS:
        section, _, name = path.rpartition(".")
        for at in range(len(name)):
            typo = f"{section}.{name[:at]}{name[at + 1 :]}"
            if len(name) > 3 and typo not in PATHS:
                tried += 1
                right += suggest(typo)[0] == path
    assert right / tried > 0.97


@given(st.sampled_from(PATHS), st.sampled_from(PATHS))
def test_a_reference_brings_the_value_or_is_told_at_its_line(path: str, target: str) -> None:
    text = yaml.safe_dump(nested({path: f"${{{target}}}"}))
    answer = loaded(text)
    if reported := [p for p in answer.errors if p.key == path]:
        assert reported[0].line == path.count(".") + 1
        return
    brought, original = value_of(answer.config, path), value_of(answer.config, target)
    if type(brought) is type(original):
        resolved = str(Path.home()) in str(original)  # ~ stands for the home folder in paths only
        assert brought == original or resolved


def value_of(value: Any, path: str) -> Any:
    for name in path.split("."):
        value = getattr(value, name)
    return value
