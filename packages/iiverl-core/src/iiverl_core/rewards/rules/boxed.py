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
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start = boxes[-1].end()
    if not text.startswith("{", start):
        unbraced = _UNBRACED.match(text, start)
        return unbraced[0].strip() if unbraced else None
    depth = 0
    for brace in _BRACE.finditer(text, start):  # an escaped brace, "\{", is a character and not a brace
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return text[start + 1 : brace.start()].strip()
    return None
