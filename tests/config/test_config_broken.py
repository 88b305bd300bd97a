"""Broken configurations, and the codes and the words that each must be answered with."""

import re
from collections import Counter
from pathlib import Path

import pytest
from broken_corpus import REFERENCE, WORDING, Case, cases, make_files, reference, without_messages, wording

import iiverl_core.config
from iiverl_core.config.diagnostics import DIAGNOSTICS

CORPUS = cases()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a few files for the cases to name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    make_files(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_a_broken_configuration_is_answered(case: Case) -> None:
    assert case.expected, "a case says what it must be answered with"
    assert without_messages(case.answer()) == case.expected


def test_the_wording_is_the_one_on_record() -> None:
    """To record another: .venv/bin/python tests/config/broken_corpus.py."""
    assert wording(CORPUS) == WORDING.read_text(encoding="utf-8")
    assert reference(CORPUS) == REFERENCE.read_text(encoding="utf-8")


def test_every_diagnostic_has_a_case() -> None:
    answered = {code for case in CORPUS for line in case.expected for code in re.findall(r"\[(C\d+)\]", line)}
    assert answered == set(DIAGNOSTICS) - {"C001"}  # of a file that cannot be read, so it is no case


def test_a_code_stands_for_one_diagnostic() -> None:
    folder = Path(iiverl_core.config.__file__).parent
    sources = [file.read_text() for file in folder.rglob("*.py") if file.name != "diagnostics.py"]
    used = Counter(code for text in sources for code in re.findall(r'"(C\d{3})"', text))
    assert used == Counter(DIAGNOSTICS.keys())
    assert len(set(DIAGNOSTICS.values())) == len(DIAGNOSTICS)
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) for name in DIAGNOSTICS.values())


def test_the_corpus_is_large() -> None:
    assert len(CORPUS) >= 60
    assert len({case.name for case in CORPUS}) == len(CORPUS)
