"""Conversations of several turns as tokens: what was sampled is kept, and only what follows is tokenized."""

import logging
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from iiverl_core.columns import IMAGE
from iiverl_core.data.chat import PromptError, write_chat
from iiverl_core.data.images import ImageProcessor
from iiverl_core.data.tokenizer import one_start
from iiverl_core.errors import ConfigError
from iiverl_core.message_parts import text_of
from iiverl_core.rollout.engine import Completion
from iiverl_core.samples import (
    KEPT_COUNTS,
    KEPT_IDS,
    ImageInputs,
    SampledTurn,
    SequenceImage,
    TokenSequence,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Message: TypeAlias = Mapping[str, Any]
ReadMessage: TypeAlias = Callable[[str], Message]

_MARK = "q7Zx"


class TurnTemplate:
    """The chat template of a policy, for conversations that go on after a response.

    `kwargs` are further variables of the template, and `images` is the processor of a policy that reads images. What tools and environments write is ordinary text: if it spells a
    control token, such as `<|im_end|>`, it is tokenized without it. Control tokens are the special tokens, and the tokens
    added to the vocabulary that the template spells, such as `<tool_call>`.

    Raises:
        ConfigError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        kwargs: Mapping[str, Any] | None = None,
        images: ImageProcessor | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"The tokenizer {tokenizer.name_or_path} has no chat template, which rollouts of several turns need.\n"
                "Set data.tokenizer to the tokenizer of an instruct model of the same family."
            )
        self.tokenizer = tokenizer
        self._kwargs, self._images = dict(kwargs or {}), images
        self._rewrites = False
        special = set(tokenizer.all_special_ids)
        added = tokenizer.added_tokens_decoder.items()
        special |= {id for id, token in added if token.special}
        self._controls = _control_tokens(tokenizer, special)
        self._tags = set(self._controls.values()) - special
        # Control tokens in other texts are rendered as marks, since only a mark can be found again in what a template
        # writes; the mark itself is one of the texts.
        self._marked = [_MARK, *self._controls]
        self._marks = {text: f"{_MARK}{number}z" for number, text in enumerate(self._marked)}
        self._any = re.compile("|".join(map(re.escape, sorted(self._marked, key=len, reverse=True))))
        self._any_mark = re.compile(_MARK + r"(\d+)z")

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Render messages up to the next response, which continues the last message if that is the assistant's.

        Raises:
            PromptError: the template rejects the messages or the tools.
        """
        continues = messages[-1]["role"] == "assistant"
        kwargs = {**self._kwargs, "add_generation_prompt": not continues, "continue_final_message": continues}
        if tools:
            kwargs["tools"] = list(tools)
        return write_chat(messages, self.tokenizer, **kwargs)

    @cached_property
    def reads_calls(self) -> bool:
        """Whether the template writes the field `tool_calls` of a message."""
        name = "find_words"
        call = {"type": "function", "id": "call00000", "function": {"name": name, "arguments": {}}}
        calls = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "tool_call_id": "call00000", "content": ""}
        try:
            return name in self.render([{"role": "user", "content": "?"}, calls, result])
        except PromptError:
            return True

    def offers(self, tools: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the template tells the model about tools."""
        user = [{"role": "user", "content": "?"}]
        try:
            return self.render(user, tools) != self.render(user)
        except PromptError:
            return True

    def escape(self, value: Any, allowed: Collection[int] = ()) -> Any:
        """Replace control tokens by marks in all texts of a value, apart from those with the ids `allowed`."""
        if isinstance(value, str):
            return self._any.sub(lambda found: self._escaped(found[0], allowed), value)
        if isinstance(value, Mapping):
            return {self.escape(key, allowed): self.escape(each, allowed) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [self.escape(each, allowed) for each in value]
        return value

    def escape_response(self, value: Any, ids: Collection[int]) -> Any:
        """Replace special tokens by marks that a response of these tokens only spells out.

        Tags such as `<think>` stay, because templates look for them in responses. A token of images becomes a mark in any
        case, since there is no image where the policy sampled one.
        """
        allowed = self._tags.union(ids)
        return self.escape(value, allowed - {self._images.token_id} if self._images else allowed)

    def encode(self, text: str, before: str = "") -> list[int]:
        """Tokenize an escaped text that stands after the text `before`."""
        ids: list[int] = []
        for number, part in enumerate(self._any_mark.split(text)):
            if number % 2:
                ids += self._plain(self._marked[int(part)])
            elif part:
                ids += self._encode_after("" if number else before, part)
        return ids

    def encode_rendering(
        self, text: str, images: Sequence[ImageInputs], *, before: str = "", start: int = 0
    ) -> tuple[list[int], list[SequenceImage]]:
        """Tokenize a text that the template wrote, and place the images that it has.

        Args:
            text: an escaped text, in which the template has one token for each image.
            images: the images.
            before: what precedes the text.
            start: position of its first token in the sequence.

        Raises:
            PromptError: there are more or fewer image tokens than images.
        """
        ids = self.encode(text, before)
        ids = ids if start else one_start(ids, self.tokenizer)
        return (ids, []) if self._images is None else self._images.place(ids, images, start)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return tokens as text; bytes that are not a whole character become U+FFFD."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def report_rewriting(self) -> None:
        """Tell once that the template rewrites earlier turns."""
        if not self._rewrites:
            logger.warning(
                "the chat template rewrites earlier turns when a conversation goes on (it may remove their reasoning); "
                "each rewritten conversation is a further sequence of its rollout"
            )
        self._rewrites = True

    def _escaped(self, text: str, allowed: Collection[int]) -> str:
        return text if self._controls.get(text) in allowed else self._marks[text]

    def _encode_after(self, before: str, text: str) -> list[int]:
        # A tokenizer may treat the beginning of a text like that of a word.
        start, whole = self._ids(before), self._ids(before + text)
        return whole[len(start) :] if whole[: len(start)] == start else self._ids(text)

    def _plain(self, text: str) -> list[int]:
        """Tokenize the text of a control token as ordinary text."""
        found = self._any.search(text) if text else None
        if found is None:
            return self._ids(text)
        cut = found.start() + 1
        return self._ids(text[:cut]) + self._plain(text[cut:])

    def _ids(self, text: str) -> list[int]:
        return (
            list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    """Escaped text of a sequence: what the template wrote, or a response, and the end token if one was sampled."""

    text: str
    sampled: bool = False
    end: str = ""


class Conversation:
    """A conversation of the policy, as messages and as tokens.

    The tokens of a response are kept as they were sampled. What follows is what the template writes after this response
    when it renders the whole conversation, so that the tokens are those of the template's rendering, apart from how
    responses are tokenized and from whitespace around them, which some templates trim.

    The content of a message may be a list of parts, `{type: text, text}` and `{type: image}`, whose images are given beside
    the messages. `messages` has its text, with `columns.IMAGE` for each of them.

    A response is a message in two forms: its text as it is, and as a rollouter has read it, for example with tool calls.
    The template gets the form with which it repeats what was sampled. If it repeats it with neither, or changes any
    earlier part of the conversation, it rewrites history: a further sequence begins, whose prompt is the whole
    conversation as the template renders it then.
    """

    def __init__(
        self,
        template: TurnTemplate,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        prompt_ids: Sequence[int] | None = None,
        prompt_images: Sequence[SequenceImage] = (),
        images: Sequence[ImageInputs] = (),
    ) -> None:
        """Begin with messages and their `images`; `tools` are the schemas of the functions that the policy may call.

        `prompt_ids` are the messages' tokens if they come from the dataset, which may use control tokens, and
        `prompt_images` the images there.

        Raises:
            PromptError: the template rejects the messages or writes nothing, or it has more or fewer image tokens than images.
        """
        self._template, self._tools = template, tools
        shown = list(messages) if prompt_ids is not None else template.escape(list(messages))
        text = template.render(shown, tools)
        self.messages: list[Message] = []
        self._shown: list[Message] = []  # in the form in which the template repeats the current sequence
        self._read: list[Message] = []  # in the form in which they were read
        self._forms: tuple[Message, Message] | None = None  # of a response that nothing follows yet
        self._turns: list[SampledTurn] = []
        self._finished: list[TokenSequence] = []
        self._seen = [*images, *(image for _, image in prompt_images)]  # of all messages
        self._add(messages, shown)
        if prompt_ids is None:
            self._begin(text, *template.encode_rendering(text, images))
        else:
            self._begin(text, list(prompt_ids), list(prompt_images))

    @property
    def ids(self) -> list[int]:
        """The tokens of the current sequence."""
        return self._ids

    @property
    def images(self) -> list[SequenceImage]:
        """The images of the current sequence."""
        return self._images

    @property
    def seen(self) -> tuple[ImageInputs, ...]:
        """The images of all messages, in the order of their placeholders."""
        return tuple(self._seen)

    @property
    def turns(self) -> tuple[SampledTurn, ...]:
        """The responses, with the positions of their messages."""
        return tuple(self._turns)

    @property
    def sequences(self) -> tuple[TokenSequence, ...]:
        """All sequences so far, each up to its last sampled token."""
        return (*self._finished, *self._sequence())

    def add_response(self, completion: Completion, read: ReadMessage | None = None) -> Message:
        """Add a response to `ids`, and return its message.

        `read` makes the message of the response's text with special tokens, without the end token; by default the message
        is the text without special tokens. The text of a message of the assistant that the response continues precedes
        it.
        """
        if self._forms is not None:
            raise RuntimeError("a response must be followed by messages before the next one")
        ids = completion.token_ids.tolist()
        size = len(ids) - (completion.finish_reason == "stop")
        text = self._template.decode(ids[:size])
        escaped = self._template.escape_response(text, ids[:size])
        if read is None:
            plain = self._template.decode(ids[:size], skip_special_tokens=True)
            message: Message = {"role": "assistant", "content": self._begun[0] + plain}
        else:
            message = read(self._begun[0] + text)
        as_sampled = {"role": "assistant", "content": self._begun[1] + escaped}
        reads_calls = self._template.reads_calls or not message.get("tool_calls")
        as_read = self._template.escape_response(message, ids[:size]) if reads_calls else as_sampled
        self._forms = as_sampled, as_read
        self._turns.append(SampledTurn(len(self.messages), len(ids)))
        self.messages.append(message)
        self._sampled.append((len(self._ids), completion))
        self._pieces.append(_Piece(escaped, sampled=True, end=self._template.decode(ids[size:])))
        self._ids.extend(ids)
        return message

    def add_messages(self, messages: Sequence[Message], images: Sequence[ImageInputs] = ()) -> bool:
        """Add messages that follow a response, with their `images`, and the start of the next response, to `ids`.

        Returns False if the template rewrites history, so that `ids` are those of a further sequence.

        Raises:
            PromptError: the template rejects the conversation, or does not write each image once.
        """
        if self._forms is None:
            raise RuntimeError("messages can be added only after a response")
        (as_sampled, read), self._forms = self._forms, None
        self._read.append(read)
        self._seen.extend(images)
        new: list[Message] = self._template.escape(list(messages))
        rendered: tuple[list[Message], str] | None = None
        problem: PromptError | None = None
        for shown in ([*self._shown, as_sampled], [*self._shown, read], list(self._read)):
            try:
                text = self._template.render([*shown, *new], self._tools)
            except PromptError as error:
                problem = error
                continue
            rendered = shown, text
            if (tail := self._tail(text)) is not None:
                self._shown = shown
                self._add(messages, new)
                self._continue(tail, images)
                return True
        if rendered is None:
            assert problem is not None
            raise problem
        self._template.report_rewriting()
        self._finished.extend(self._sequence())
        self._shown, text = rendered
        self._add(messages, new)
        self._begin(text, *self._template.encode_rendering(text, self._seen))
        return False

    def _add(self, messages: Sequence[Message], escaped: Sequence[Message]) -> None:
        """Add messages; one of the assistant at the end is the beginning of the next response."""
        begun = messages[-1]["role"] == "assistant"
        if begun and not isinstance(messages[-1]["content"], str):
            raise PromptError(
                "ends with a message of the assistant that has an image, which no response can continue"
            )
        self._begun = (str(messages[-1]["content"]), str(escaped[-1]["content"])) if begun else ("", "")
        count = len(messages) - begun
        self.messages.extend(
            {**message, "content": text_of(message["content"], IMAGE)} for message in messages[:count]
        )
        self._shown.extend(escaped[:count])
        self._read.extend(escaped[:count])

    def _begin(self, text: str, ids: list[int], images: list[SequenceImage]) -> None:
        self._ids, self._images = ids, images
        if not self._ids:
            raise PromptError("is a conversation without tokens; check the chat template")
        self._pieces = [_Piece(text)]
        self._sampled: list[tuple[int, Completion]] = []  # with the positions of their first tokens

    def _continue(self, tail: str, images: Sequence[ImageInputs]) -> None:
        last = self._pieces[-1]
        ids, placed = self._template.encode_rendering(
            tail, images, before=last.end or last.text[-1:], start=len(self._ids)
        )
        self._ids.extend(ids)
        self._images = [*self._images, *placed]
        self._pieces.append(_Piece(tail))

    def _tail(self, text: str) -> str | None:
        """Return what follows the pieces in a rendered text; None if it does not begin with them.

        Whitespace around responses may differ.
        """
        position = 0
        following = [*(piece.text for piece in self._pieces[1:]), ""]
        for piece, after in zip(self._pieces, following, strict=True):
            length, rest = len(piece.text), piece.end + after if piece.sampled else ""
            if not text.startswith(piece.text + rest, position):
                if not piece.sampled:
                    return None
                words = re.escape(piece.text.strip())
                found = re.compile(rf"\s*{words}\s*?(?={re.escape(rest)})").match(text, position)
                if found is None:
                    return None
                length = found.end() - position
            position += length + len(piece.end)
        return text[position:]

    def _sequence(self) -> list[TokenSequence]:
        """Return the current sequence, if any of it was sampled."""
        if not self._sampled:
            return []
        start, last = self._sampled[-1]
        length = start + len(last.token_ids)
        mask = np.zeros(length, dtype=bool)
        log_probs = np.zeros(length, dtype=np.float32)
        for at, completion in self._sampled:
            mask[at : at + len(completion.token_ids)] = True
            log_probs[at : at + len(completion.token_ids)] = completion.log_probs
        ids = np.asarray(self._ids[:length], dtype=np.int64)
        kept = _kept(completion for _, completion in self._sampled)
        images = tuple(each for each in self._images if each.start < length)
        return [TokenSequence(ids, mask, log_probs, kept, images)]


def _kept(completions: Iterable[Completion]) -> dict[str, np.ndarray]:
    """Join what top-k and top-p kept of the responses of a sequence."""
    ids: list[np.ndarray] = []
    counts: list[np.ndarray] = []
    known = False
    for each in completions:
        known = known or each.kept is not None
        ids.append(np.zeros(0, np.int32) if each.kept is None else each.kept.ids)
        counts.append(np.zeros(len(each.token_ids), np.int32) if each.kept is None else each.kept.counts)
    return {KEPT_IDS: np.concatenate(ids), KEPT_COUNTS: np.concatenate(counts)} if known else {}


def _control_tokens(tokenizer: "PreTrainedTokenizerBase", special: Collection[int]) -> dict[str, int]:
    """Return the ids of the control tokens by their text: special ones, and tags that the template spells.

    Other added tokens are letters, words or runs of spaces.
    """
    source = str(tokenizer.chat_template)
    controls = {}
    for id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        is_tag = len(text) > 1 and not text.isalnum() and not text.isspace() and text in source
        if text and (id in special or is_tag):
            controls[text] = id
    return controls
