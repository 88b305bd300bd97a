"""Finding answers in what models write."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_reward_client.verifiers.extraction import (
    code_blocks,
    language_name,
    last_box,
    last_code_block,
    split_turn,
)

MARKER = "<｜Assistant｜>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("q<｜Assistant｜>a", ("q<｜Assistant｜>", "a")),
        (
            "q<｜Assistant｜>a<｜User｜>q<｜Assistant｜>b",
            ("q<｜Assistant｜>a<｜User｜>q<｜Assistant｜>", "b"),
        ),
        ("<|Assistant|>a", (None, "<|Assistant|>a")),
        ("q<｜Assistant｜>", ("q<｜Assistant｜>", "")),
    ],
)
def test_a_response_stands_behind_the_last_marker(text: str, expected: tuple[str | None, str]) -> None:
    assert split_turn(text, MARKER) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no box", None),
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\fbox{3} \\fboxed{4}", "4"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("a stray { then \\boxed{5} and }", "5"),
        ("} \\boxed {6}", "6"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\\\boxed{8}", "8"),
        ("\\boxed{}", ""),
        ("$\\boxed 9$", "9"),
        ("\\fbox{1} or \\boxed{2}, \\boxed -3", "-3"),
        ("$\\boxed\\frac{1}{2}$", "\\frac{1}{2}"),
        ("\\boxed{4}, with \\boxed as asked", "4"),
        ("\\boxed 5$ and then \\boxed{6", "5"),
        ("\\boxed", None),
    ],
)
def test_the_last_closed_box(text: str, expected: str | None) -> None:
    assert last_box(text) == expected


balanced = st.recursive(
    st.text(alphabet="ab1 \\,+", max_size=5).map(lambda text: text.replace("\\", "\\\\")),
    lambda inner: st.lists(inner, max_size=3).map(lambda parts: "{" + "".join(parts) + "}"),
    max_leaves=10,
)


@given(before=st.text(alphabet="ab {\n"), inside=balanced, after=st.text(alphabet="ab \n"))
def test_a_box_is_found_whatever_stands_before_it(before: str, inside: str, after: str) -> None:
    assert last_box(f"{before}\\boxed{{{inside}}}{after}") == inside


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("```python\nx = 1\n```", [("python", "x = 1\n")]),
        ("so: ```py\na``` done", []),
        ("so: ```py\na```", [("python", "a")]),
        ("```\na\n```\n```C++ main.cpp\nb\n```\n", [("", "a\n"), ("cpp", "b\n")]),
        ('```python\ns = "```x"\n```', [("python", 's = "```x"\n')]),
        ("```python\nnever closed", []),
        ("``` ```", []),
        ("```python3.10\na\n```", [("python", "a\n")]),
        ("~~~py\na\n```\nb\n~~~", [("python", "a\n```\nb\n")]),
        ("```python\r\na\r\nb\r\n```\r\n", [("python", "a\nb\n")]),
        ("1. so:\n   ```python\n   if a:\n       b\n   ```", [("python", "if a:\n    b\n")]),
        ("  ```python\na\n  b\n  ```", [("python", "a\n  b\n")]),
        ("````{.python}\n```\n````", [("python", "```\n")]),
        ("```python\na = '\x0c\u2028'\n```", [("python", "a = '\x0c\u2028'\n")]),
    ],
)
def test_fenced_blocks(text: str, expected: list[tuple[str, str]]) -> None:
    assert code_blocks(text) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("py py3 Python python3.12 ipython cpython pypy3 {.python} python:main.py python,linenos", "python"),
        ("c++ C++17 cpp20 cc cxx cpp", "cpp"),
        ("js JavaScript node nodejs", "nodejs"),
        ("sh shell bash", "bash"),
        ("go golang", "go"),
        ("r R", "R"),
        ("c# csharp cs", "csharp"),
        ("rs Rust", "rust"),
        ("java", "java"),
        ("", ""),
        ("pyret", "pyret"),
    ],
)
def test_names_of_one_language(names: str, expected: str) -> None:
    """A fence and a reference may name it differently; the sandbox gets the name that Sandbox Fusion has."""
    assert {language_name(name) for name in names.split(" ")} == {expected}


def test_the_last_block_of_a_language() -> None:
    text = "```python\n1\n```\n```py\n2\n```\n```cpp\n3\n```\n"
    assert last_code_block(text) == "3\n"
    assert last_code_block(text, "Python") == "2\n"
    assert last_code_block(text, "rust") is None
    assert last_code_block(text + "```\n4\n```", "python3.12") == "2\n"
    assert last_code_block("```\n1\n```\n```\n2\n```\n```cpp\n3\n```", "python") == "2\n"


@pytest.mark.parametrize(
    "text",
    [
        "```py\n" * 100_000,
        "```\n" + "`" * 500_000 + "x",
        "~" * 500_000 + "`",
        "```" * 200_000,
        "`" * 500_000,
        "\\boxed{" * 70_000,
        "\\boxed" + " " * 500_000,
    ],
)
def test_long_nonsense_takes_time_in_proportion(text: str) -> None:
    began = time.monotonic()
    last_box(text)
    code_blocks(text)
    assert time.monotonic() - began < 2
