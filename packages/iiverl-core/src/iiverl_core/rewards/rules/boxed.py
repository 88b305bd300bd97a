"""The answer in a box: finding the last one of a text."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_UNBRACED = re.compile(r"[^$\n]*")


def last_boxed(text: str) -> str | None:
    r"""Give what the last `\boxed{…}` of a text holds, or None where there is none or its brace is never closed.

    A box without braces, as in `$\boxed 5$`, ends at the next dollar sign or at the end of its line. An unclosed last
    box is an answer that was cut off: an earlier box does not stand in for it.
    """
    last = None
    for last in _BOX.finditer(text):
        pass
    if last is None:
        return None
    if not text.startswith("{", last.end()):
        unbraced = _UNBRACED.match(text, last.end())
        return unbraced[0].strip() if unbraced else None
    depth = 0
    for brace in _BRACE.finditer(text, last.end()):  # an escaped brace, "\{", is a character and not a brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[last.end() + 1 : brace.start()].strip()
    return None
