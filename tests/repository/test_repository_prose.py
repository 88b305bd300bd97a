"""Docstrings and messages use plain, idiomatic English, and the terms that the field uses."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "packages").glob("*/src/**/*.py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]

INSTEAD = {
    r"where there (is|are) none": "if there is none",
    r"anew": "again",
    r"mends?|mended": "fix",
    r"besides": "also, apart from",
    r"makes? no sense": "is invalid",
    r"(?<!there )is no (finite|valid|number)": "is not …",
    r"(is|are) told": "is reported",
    r"(?<!and )owe[sd]?": "pending, unfinished",
    r"no place for": "could not place",
    r"(the )?(completion|answer)s? of the (policy|actor)": "response",
}
"""Phrases that are not idiomatic, or words for which the project has another term, and what to write."""


@pytest.mark.parametrize("phrase", INSTEAD)
def test_prose_is_idiomatic(phrase: str) -> None:
    pattern = re.compile(rf"(?<!\w)({phrase})\b", re.IGNORECASE)
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in (*SOURCES, *PAGES)
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"write {INSTEAD[phrase]!r}:\n" + "\n".join(found)


def test_module_docstrings_name_their_subject() -> None:
    """A module is, or does, something; a first line that begins with a question word says neither."""
    questions = {
        str(file.relative_to(ROOT)): docstring.splitlines()[0]
        for file in SOURCES
        if (docstring := ast.get_docstring(ast.parse(file.read_text())))
        and re.match(r"(What|Which|How|Where|Who|When)\b", docstring)
    }
    assert not questions
