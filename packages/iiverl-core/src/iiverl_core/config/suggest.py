"""Suggest the known key that an unknown one means.

A wrong suggestion is worse than none, since it may lead to a key that breaks the run. So a key is suggested only if a
table says that it means the same, or if the unknown key is a misspelling of a key in the same section.
"""

from collections.abc import Iterable

from iiverl_core.config.schema import join, keys, sections
from iiverl_core.config.synonyms import below, canonical, find_synonym
from iiverl_core.config.verl_keys import unread_below

MAX_LISTED_KEYS = 10
"""Sections with more keys are not listed in messages."""


def suggest(path: str) -> tuple[str | None, str]:
    """Return the key that an unknown one means, if any, and a hint that completes the message about it."""
    path = canonical(path, None)[0]
    synonym = find_synonym(path)
    if synonym and not _is_known(synonym.key):  # a key that moved within a section that moved
        synonym = find_synonym(synonym.key)
    if synonym and _is_known(synonym.key):
        return synonym.key, f"use {synonym.key}" + (f" ({synonym.note})" if synonym.note else "")
    section, _, name = path.rpartition(".")
    if section in keys():
        return None, f"{section} is a value, not a section"
    siblings = list(sections()[section].model_fields) if section in sections() else []
    meant = nearest(name, siblings)
    if meant:
        return join(section, meant), f"did you mean {join(section, meant)}?"
    few = 0 < len(siblings) <= MAX_LISTED_KEYS
    return None, f"{section or 'the configuration'} has {', '.join(siblings)}" if few else ""


def moved_within(path: str) -> bool:
    """Return whether to look at the keys of an unknown section instead of the section: only they are in the tables."""
    return find_synonym(path) is None and (any(below(path)) or any(unread_below(canonical(path, None)[0])))


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Find the known word that a word is a misspelling of; None if there is no such word or more than one.

    Case, underscores, hyphens and the order of the parts between them are ignored. One letter may be wrong, missing,
    added or swapped with its neighbour, or two in words of 8 letters or more. A word that lacks a part is a different
    word.
    """
    parts = set(_parts(word))
    distances = sorted(
        (_distance(word, other), other)
        for other in known
        if not (parts < set(_parts(other)) or parts > set(_parts(other)))
    )
    if not distances or distances[0][0] > _tolerance(word):
        return None
    if len(distances) > 1 and distances[0][0] == distances[1][0]:
        return None
    return distances[0][1]


def _is_known(path: str) -> bool:
    return path in keys() or path in sections()


def _tolerance(word: str) -> int:
    letters = len(_letters(word))
    return 0 if letters < 3 else 1 if letters < 8 else 2


def _letters(word: str) -> str:
    return "".join(_parts(word))


def _parts(word: str) -> list[str]:
    return word.lower().replace("-", "_").split("_")


def _distance(left: str, right: str) -> int:
    if sorted(_parts(left)) == sorted(_parts(right)):
        return 0
    return _edits(_letters(left), _letters(right))


def _edits(left: str, right: str) -> int:
    """Count the edits between two words (optimal string alignment, in which swapping neighbours is one edit)."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        before, above, row = row, before, [i]
        for j, b in enumerate(right, 1):
            edits = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and b == left[i - 2]:
                edits = min(edits, above[j - 2] + 1)
            row.append(edits)
    return row[-1]
