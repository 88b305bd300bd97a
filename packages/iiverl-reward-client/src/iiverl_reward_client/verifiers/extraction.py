"""Extract answers from a model's text: the response of a conversation, the last box, the last block of code.

Each function takes time linear in the text, whatever a model wrote.
"""

import re

_OPENING = re.compile(r"```([^\n`]*)\n")
_CLOSING = re.compile(r"```[ \t]*$", re.MULTILINE)
_BOX = re.compile(r"\\f?boxed\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)

_ALIASES = {"py": "python", "python3": "python", "c++": "cpp", "js": "javascript", "sh": "bash"}


def split_turn(llm_output: str, marker: str) -> tuple[str | None, str]:
    """Split a conversation after its last `marker` into prompt (including the marker) and response.

    Without a marker everything is the response, and the prompt is None.
    """
    before, found, response = llm_output.rpartition(marker)
    return (before + found, response) if found else (None, llm_output)


def last_box(text: str) -> str | None:
    r"""Return the content of the last closed `\boxed{…}`, with balanced braces; None if there is none."""
    stack: list[int | None] = []
    openings = {match.end() - 1: match.end() for match in _BOX.finditer(text)}
    last: tuple[int, int] | None = None
    for match in _BRACES.finditer(text):
        if match[0] == "{":
            stack.append(openings.get(match.start()))
        elif match[0] == "}" and stack:
            start = stack.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
    return None if last is None else text[last[0] : last[1]]


def code_blocks(text: str) -> list[tuple[str, str]]:
    """List the closed fenced blocks as (language in lower case, code); the language may be empty."""
    blocks: list[tuple[str, str]] = []
    position = 0
    while opening := _OPENING.search(text, position):
        closing = _CLOSING.search(text, opening.end())
        if closing is None:
            break
        words = opening[1].split()
        language = words[0].lower() if words else ""
        blocks.append((_ALIASES.get(language, language), text[opening.end() : closing.start()]))
        position = closing.end()
    return blocks


def last_code_block(text: str, language: str | None = None) -> str | None:
    """Return the code of the last closed fenced block, optionally of one language; None if there is none."""
    wanted = None if language is None else _ALIASES.get(language.lower(), language.lower())
    for found, code in reversed(code_blocks(text)):
        if wanted in (None, found):
            return code
    return None
