"""Render prompts and conversations as text for a model."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptError(ValueError):
    """An invalid prompt; the message completes a sentence that begins with the prompt's position."""


def render(prompt: Any, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Render a chat with the tokenizer's template, up to the assistant's turn; return a string unchanged.

    Raises:
        PromptError: the prompt is neither, or the template rejects the chat.
    """
    if isinstance(prompt, str):
        return prompt
    return write_chat(as_messages(prompt), tokenizer, add_generation_prompt=True)


def write_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    add_generation_prompt: bool,
) -> str:
    """Render messages with the tokenizer's template, optionally with the start of the assistant's turn.

    Raises:
        PromptError: the template rejects the chat.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )
    except (TemplateError, ValueError, TypeError) as error:
        raise PromptError(f"is a chat that the tokenizer's chat template rejects: {error}") from error


def as_messages(prompt: Any) -> list[dict[str, Any]]:
    """Check a chat and return its messages, without the empty fields that column formats add.

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
    return [_message(message, number) for number, message in enumerate(prompt)]


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise PromptError(
            f"is not a chat: its message {number} is of type {type(message).__name__}, not {{role, content}}"
        )
    for name in ("role", "content"):
        value = message.get(name)
        if value is None:
            fields = ", ".join(field for field in message if message[field] is not None) or "nothing"
            raise PromptError(f"is not a chat: its message {number} has no {name} (it has {fields})")
        if not isinstance(value, str):
            parts = " (images and other parts are not read)" if isinstance(value, list) else ""
            raise PromptError(
                f"is not a chat: the {name} of its message {number} is of type {type(value).__name__}, not a string{parts}"
            )
    return {field: value for field, value in message.items() if value is not None}
