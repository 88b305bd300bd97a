"""Write a prompt and its response as token ids for a reward model with its own tokenizer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from iiverl_core.config import RunConfig
from iiverl_core.data.chat import PromptError, write_chat
from iiverl_core.data.prompts import Truncation
from iiverl_core.data.tokenizer import load_reward_tokenizer, load_tokenizer, one_start
from iiverl_core.errors import ConfigError
from iiverl_core.samples import Prompt, Rollout, TokenSequence
from iiverl_reward_client import Failed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ConversationWriter:
    """Writes whole conversations with a reward model's `tokenizer`.

    A chat, with the response as the assistant's message, is rendered with the tokenizer's chat template, without the
    start of another turn and with no special tokens but the template's. The template decides what the model sees; some
    omit the reasoning of a response. A plain string is followed by the response, with the special tokens that the
    tokenizer itself adds to a text; `written_bos`, the beginning-of-sequence token of the tokenizer that wrote the
    prompt, is removed first, since it is plain text to another tokenizer.

    `truncation` cuts off the beginning (`left`) or the end (`right`) of a conversation of more than `max_length` tokens
    (None: no limit), or rejects it (`error`). A chat that is truncated for the policy (`data.truncation`) is complete
    here.
    """

    tokenizer: "PreTrainedTokenizerBase"
    written_bos: str | None = None
    max_length: int | None = None
    truncation: Truncation = "right"

    def ids(self, prompt: Prompt, response: str) -> list[int]:
        """Return the token ids of a prompt and a response without special tokens.

        Raises:
            ConfigError: the prompt is a chat, and the tokenizer has no chat template.
            PromptError: the template rejects the chat or renders nothing, or the conversation is too long.
        """
        ids = (
            self._text_ids(prompt, response) if prompt.chat is None else self._chat_ids(prompt.chat, response)
        )
        if not ids:
            raise PromptError(
                "is a conversation without tokens for the reward model; check its chat template"
            )
        if self.max_length is None or len(ids) <= self.max_length:
            return ids
        if self.truncation == "error":
            raise PromptError(
                f"and its response are {len(ids)} tokens for the reward model, and reward_model.max_length is "
                f"{self.max_length}; raise it, or cut such conversations off (reward_model.truncation: left or right)"
            )
        return ids[: self.max_length] if self.truncation == "right" else ids[-self.max_length :]

    def _chat_ids(self, chat: tuple[Mapping[str, Any], ...], response: str) -> list[int]:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"reward_model.model.path: the tokenizer {self.tokenizer.name_or_path} has no chat template, and the "
                "prompts are chats.\nSave one with a chat_template beside the reward model; or, if the reward model was "
                "trained on the policy's own tokens, set reward_model.model.input_tokenizer to null."
            )
        messages = list(chat)
        begun = (
            messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        )  # the response continues it
        messages.append({"role": "assistant", "content": begun + response})
        text = write_chat(messages, self.tokenizer, add_generation_prompt=False)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _text_ids(self, prompt: Prompt, response: str) -> list[int]:
        text = prompt.text.removeprefix(self.written_bos or "") + response
        return one_start(self.tokenizer(text, verbose=False)["input_ids"], self.tokenizer)


def load_conversation_writer(run: RunConfig) -> ConversationWriter | None:
    """Load the writer of the reward model's conversations; None if it reads the policy's own tokens or there is none.

    It reads the policy's tokens if `input_tokenizer` is None. Other values of that key do not matter, since the
    policy's tokenizer has decoded the responses.

    Raises:
        ConfigError: a tokenizer cannot be read, or `reward_model.max_length` would cut the policy's own sequences.
    """
    settings = run.rewards.conversation
    if settings is None:
        return None
    if settings.input_tokenizer is not None:
        written_bos = load_tokenizer(run).bos_token
        return ConversationWriter(
            load_reward_tokenizer(run.roles["reward"]),
            written_bos if isinstance(written_bos, str) else None,
            settings.max_length,
            settings.truncation,
        )
    longest = run.rollout.prompt_length + run.rollout.response_length
    if settings.max_length is not None and settings.max_length < longest:
        raise ConfigError(
            f"reward_model.max_length is {settings.max_length}, and with reward_model.model.input_tokenizer: null the "
            f"model reads prompt and response as they are, up to {longest} tokens.\n"
            "Set reward_model.max_length to null, or data.max_prompt_length and data.max_response_length to less."
        )
    return None


def to_reward_tokens(rollout: Rollout, writer: ConversationWriter) -> TokenSequence | Failed:
    """Write the whole conversation in the reward model's tokens, none of them trained.

    A conversation that cannot be written, or is too long with `reward_model.truncation: error`, is a failure of kind
    `function`.

    Raises:
        ConfigError: the prompt is a chat, and the reward model's tokenizer has no chat template.
    """
    try:
        return TokenSequence.untrained(writer.ids(rollout.prompt, rollout.text))
    except PromptError as error:
        return Failed("function", detail=f"{rollout.prompt.place}: the prompt {error}")


def check_conversations(writer: ConversationWriter, prompts: Iterable[Prompt]) -> None:
    """Check that prompts, with a one-word response, can be written for the reward model.

    Raises:
        ConfigError: a prompt cannot; names its row.
    """
    for prompt in prompts:
        try:
            writer.ids(prompt, "answer")
        except PromptError as error:
            raise ConfigError(f"{prompt.place}: the prompt {error}") from error
