"""A lower bound on the tokens of prompts, without the libraries that render chats."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iiverl_core.columns import IMAGE
from iiverl_core.config.model_facts import find_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MERGED = 2  # tokens of a text that may become one with what a template has around it, at most


def first_too_long(
    path: str, rows: Sequence[Mapping[str, Any]], column: str, limit: int
) -> tuple[int, int] | None:
    """Find the first row whose prompt has certainly more than `limit` tokens, and a lower bound of their number.

    Of a chat, only the user's messages count, since a template may leave out what others say. `path` is a tokenizer's
    folder or its name on the Hub; returns None if it is not on this machine.
    """
    for number, row in enumerate(rows):
        texts = [text.strip() for text in _texts(row.get(column))]
        if sum(len(text.encode("utf-8", "replace")) for text in texts) <= limit:
            continue  # a token has at least a byte
        file = _file(path)
        tokenizer = None if file is None else _load(str(file), file.stat().st_mtime_ns)
        if tokenizer is None:
            return None
        encoded = tokenizer.encode_batch(
            [text.encode("utf-8", "replace").decode() for text in texts], add_special_tokens=False
        )
        least = sum(max(len(each.ids) - _MERGED, 0) for each in encoded)
        if least > limit:
            return number, least
    return None


def _texts(prompt: Any) -> Iterator[str]:
    """Yield a text prompt, or what the user says in a chat."""
    if isinstance(prompt, str):
        if not prompt.lstrip().startswith(("[", "{")):
            yield prompt
            return
        try:
            prompt = json.loads(prompt)
        except (ValueError, RecursionError):
            return
    for message in prompt if isinstance(prompt, list) else ():
        if isinstance(message, dict) and message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                yield content.replace(IMAGE, "")


def _file(path: str) -> Path | None:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        found = find_config(path)
        folder = found.parent if found else folder
    file = folder / "tokenizer.json"
    return file if file.is_file() else None


@lru_cache(maxsize=4)
def _load(file: str, _stamp: int) -> "Tokenizer | None":
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(file)
    except Exception:  # the library raises nothing narrower; whoever loads the tokenizer reports it
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
