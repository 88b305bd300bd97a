"""Extract answers from a model's text: the response of a conversation, the last box, the last block of code.

Each function takes time linear in the text, whatever a model wrote.
"""

import re

_OPENING = re.compile(r"^(?P<indent>[ \t]*)(?P<fence>`{3,}+|~{3,}+)(?P<label>[^`]*)$")
_OPENING_IN_LINE = re.compile(r"(?P<indent>)(?P<fence>```)(?P<label>[^`]*)$")
_BOX = re.compile(r"\\(?:f?boxed|fbox)(?![a-zA-Z])\s*")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
# A box without braces, as in `$\boxed 5$`, holds what looks like mathematics: "\boxed as asked" is prose.
_UNBRACED = re.compile(r"(?=[-+]?[\d.]|\\[a-zA-Z]|[a-zA-Z](?![a-zA-Z]))[^$\n]*")
_LINE_END = re.compile(r"\r\n|\r|\n")

_ALIASES = {
    alias: name  # as Sandbox Fusion has it
    for name, aliases in {
        "R": "r", "bash": "sh shell zsh", "cpp": "c++ cc cxx", "csharp": "c# cs", "go": "golang", "julia": "jl",
        "nodejs": "javascript js node", "perl": "pl", "ruby": "rb", "rust": "rs", "typescript": "ts",
    }.items()
    for alias in aliases.split()
}  # fmt: skip
_PYTHON = re.compile(r"(?:py|[ic]?python|pypy)[0-9.]*")
_CPP = re.compile(r"(?:c\+\+|cpp)[0-9]{2}")
_LABEL_END = re.compile(r"[:,;={(\[]")


def split_turn(llm_output: str, marker: str) -> tuple[str | None, str]:
    """Split a conversation after its last `marker` into prompt (including the marker) and response.

    Without a marker everything is the response, and the prompt is None.
    """
    before, found, response = llm_output.rpartition(marker)
    return (before + found, response) if found else (None, llm_output)


def split_lines(text: str) -> list[str]:
    r"""Split at `\n`, `\r\n` and `\r` only: a form feed or U+2028 is part of a line. The last line end closes a line."""
    lines = _LINE_END.split(text)
    if not lines[-1]:
        lines.pop()
    return lines


def last_box(text: str) -> str | None:
    r"""Return the content of the last whole box; None if there is none.

    A box is `\boxed{…}` or `\fbox{…}` with balanced braces, or, without braces, as in `$\boxed 5$`, ends at the next
    dollar sign or at the end of the line. A box whose brace is not closed was cut off, and does not count.
    """
    stack: list[int | None] = []
    boxes = [match.end() for match in _BOX.finditer(text)]
    openings = {end for end in boxes if text.startswith("{", end)}
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match[0] == "{":
            stack.append(match.end() if match.start() in openings else None)
        elif match[0] == "}" and stack:
            start = stack.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
    for end in reversed(boxes):
        if last is not None and end < last[0]:
            break
        unbraced = None if end in openings else _UNBRACED.match(text, end)
        if unbraced is not None:
            return unbraced[0].rstrip()
    return None if last is None else text[last[0] : last[1]]


def language_name(label: str) -> str:
    """Return the usual name of a programming language: `py`, `Python3.10` and `python:main.py` are `python`."""
    name = _LABEL_END.split(label.strip().lower().strip("{}").lstrip("."))[0]
    if _PYTHON.fullmatch(name):
        return "python"
    return "cpp" if _CPP.fullmatch(name) else _ALIASES.get(name, name)


def code_blocks(text: str) -> list[tuple[str, str]]:
    """List the closed fenced blocks as (language, code); the language may be empty.

    Fences are three or more backticks or tildes, and may be indented; so much indentation is taken from the code.
    """
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    lines: list[str] = []
    for line in _LINE_END.split(text):
        if opening is None:
            opening, lines = _OPENING.match(line) or _OPENING_IN_LINE.search(line), []
            continue
        fence = opening["fence"]
        before = line.rstrip(" \t")
        code = before.rstrip(fence[0])
        if len(before) - len(code) < len(fence):
            lines.append(line)
            continue
        lines.append(code if code.strip() else "")
        words = opening["label"].split()
        language = language_name(words[0]) if words else ""
        blocks.append((language, "\n".join(_dedented(lines, opening["indent"]))))
        opening = None
    return blocks


def _dedented(lines: list[str], indent: str) -> list[str]:
    """Take the fence's indentation from lines that have it, unless a line of code has less."""
    if not indent or any(line.strip() and not line.startswith(indent) for line in lines):
        return lines
    return [line.removeprefix(indent) for line in lines]


def last_code_block(text: str, language: str | None = None) -> str | None:
    """Return the code of the last closed fenced block, of one language if that is given; None if there is none.

    Without a block of that language, the last block without a language counts.
    """
    blocks = code_blocks(text)
    wanted = None if language is None else (language_name(language), "")
    if wanted is not None and any(found == wanted[0] for found, _ in blocks):
        wanted = wanted[:1]
    return next((code for found, code in reversed(blocks) if wanted is None or found in wanted), None)
