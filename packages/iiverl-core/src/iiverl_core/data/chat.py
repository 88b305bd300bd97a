"""Render prompts and conversations as text for a model."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from iiverl_core.columns import IMAGE, without_nulls

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages: TypeAlias = list[dict[str, Any]]

_IMAGE_PARTS = ("image", "image_url", "input_image")
_TEXT_PARTS = ("text", "input_text")

_SURROGATE = re.compile("[\ud800-\udfff]")


class PromptError(ValueError):
    """An invalid prompt; the message completes a sentence that begins with the prompt's position."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders prompts as the policy reads them.

    A chat is rendered with the chat template of `tokenizer` and the further variables `kwargs`, up to the assistant's
    turn. If its last message is the assistant's, the response continues that message. A string is not changed.
    """

    tokenizer: "PreTrainedTokenizerBase"
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def render(self, prompt: str | Messages, tools: Any = None) -> str:
        """Render a prompt that `as_prompt` returned; `tools` is the value of the row's column of tools.

        Raises:
            PromptError: the template rejects the chat or the tools, or the text cannot be encoded.
        """
        if isinstance(prompt, str):
            return _checked(prompt)
        continues = prompt[-1]["role"] == "assistant"
        kwargs = {**self.kwargs, "add_generation_prompt": not continues, "continue_final_message": continues}
        if schemas := as_tools(tools):
            kwargs["tools"] = schemas
        return write_chat(prompt, self.tokenizer, **kwargs)


def write_chat(
    messages: Sequence[Mapping[str, Any]], tokenizer: "PreTrainedTokenizerBase", **kwargs: Any
) -> str:
    """Render messages with the tokenizer's template; `kwargs` are those of `apply_chat_template`.

    Raises:
        PromptError: the template rejects the chat, or the text cannot be encoded.
    """
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, **kwargs
        )
    except Exception as error:  # a template is a program of the model's author
        reason = (
            f"{type(error).__name__}: {error}" if isinstance(error, ArithmeticError | LookupError) else error
        )
        raise PromptError(f"is a chat that the tokenizer's chat template rejects: {reason}") from error
    return _checked(str(text))


def as_prompt(value: Any, images: list[Any] | None = None) -> str | Messages:
    """Check the value of a prompt column: a text, or a chat, which may be stored as JSON text.

    With a list for `images`, the content of a message may be a list of text and image parts. It becomes a text, in which
    `IMAGE` stands for an image, and the value of each image part is appended to the list: None if it has none.

    Raises:
        PromptError: it is neither, or has other parts.
    """
    if not isinstance(value, str):
        return as_messages(value, images)
    chat = _parsed(value)
    return as_messages(chat, images) if _looks_like_chat(chat) else value


def as_tools(value: Any) -> list[dict[str, Any]]:
    """Check the tool schemas of a row, a list of objects or its JSON text; empty if there are none.

    Raises:
        PromptError: they are something else.
    """
    tools = _parsed(value) if isinstance(value, str) else value
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise PromptError(
            "has tools (data.tools_key) that are not a list of JSON schemas; rename the column, or set data.tools_key to null"
        )
    return without_nulls(tools)


def as_messages(prompt: Any, images: list[Any] | None = None) -> Messages:
    """Check a chat and return its messages, without the empty fields that column formats add; see `as_prompt`.

    Raises:
        PromptError: it is not a chat, or a message has no role or content.
    """
    if isinstance(prompt, Mapping) and all(isinstance(field, list) for field in prompt.values()):
        # A list of structs as datasets before version 4 wrote it: one list per field.
        prompt = [dict(zip(prompt, fields, strict=True)) for fields in zip(*prompt.values(), strict=True)]
    if prompt is None:
        raise PromptError("is empty (null)")
    if not isinstance(prompt, list):
        raise PromptError(
            f"is of type {type(prompt).__name__}, neither a chat (a list of {{role, content}}) nor a string"
        )
    if not prompt:
        raise PromptError("is a chat without messages")
    return [_message(message, number, images) for number, message in enumerate(prompt)]


def _message(message: Any, number: int, images: list[Any] | None) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(
            f"is not a chat: its message {number} is of type {type(message).__name__}, not {{role, content}}"
        )
    if images is not None and isinstance(message.get("content"), list):
        message = {**message, "content": _joined(message["content"], number, images)}
    calls_tools = bool(message.get("tool_calls"))
    for name in ("role", "content"):
        value = message.get(name)
        if value is None and name == "content" and calls_tools:
            continue  # a message may consist of calls alone
        if value is None:
            fields = ", ".join(field for field in message if message[field] is not None) or "nothing"
            raise PromptError(f"is not a chat: its message {number} has no {name} (it has {fields})")
        if not isinstance(value, str):
            parts = " (the model reads texts only)" if isinstance(value, list) else ""
            raise PromptError(
                f"is not a chat: the {name} of its message {number} is of type {type(value).__name__}, not a string{parts}"
            )
    # Templates test whether the content is a string, and some fail if there is none.
    return {**({"content": ""} if calls_tools else {}), **without_nulls(message)}


def _joined(parts: Sequence[Any], number: int, images: list[Any]) -> str:
    """Join the parts of a message's content, and append the values of its images to `images`."""
    texts: list[str] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _IMAGE_PARTS:
            given = [part[name] for name in ("image_url", "image", "url", "path", "bytes") if part.get(name)]
            images.append(given[0] if given else None)
            texts.append(IMAGE)
        else:
            what = f"of type {kind!r}" if isinstance(kind, str) else "not an object with a type"
            raise PromptError(
                f"is a chat in which a part of message {number} is {what}; the parts that are read are text and image"
            )
    return "".join(texts)


def _parsed(text: str) -> Any:
    """Parse a JSON array; None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _looks_like_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and "role" in message for message in value)
    )


def _checked(text: str) -> str:
    """Return a text if it can be encoded."""
    if not text.isascii() and (found := _SURROGATE.search(text)):
        raise PromptError(
            f"has half a character (the lone surrogate U+{ord(found[0]):04X}), which is no text; a file was cut or "
            "escaped in the wrong place"
        )
    return text
