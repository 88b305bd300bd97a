"""A prompt and the response to it as the token ids that a reward model with a tokenizer of its own is given."""

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

    A chat becomes its messages and the response as the assistant's, through the tokenizer's chat template: without a
    beginning of another answer, and with no special tokens but the template's. The template decides what the model
    sees; some leave out an answer's reasoning. A prompt that is a plain string is followed by the response, with the
    special tokens that the tokenizer itself puts around a text; `written_bos`, the beginning-of-sentence token of the
    tokenizer that wrote the prompt, is taken off first, since to another tokenizer it is mere text.

    Of a conversation of more than `max_length` tokens (None: no bound), `truncation` cuts off the beginning (`left`) or
    the end (`right`), or refuses it (`error`). A prompt that the policy is given shortened (`data.truncation`) stands
    here in full where it is a chat.
    """

    tokenizer: "PreTrainedTokenizerBase"
    written_bos: str | None = None
    max_length: int | None = None
    truncation: Truncation = "right"

    def ids(self, prompt: Prompt, response: str) -> list[int]:
        """Give the token ids of a prompt and a response, which is without special tokens.

        Raises:
            ConfigError: the prompt is a chat, and the tokenizer has no chat template.
            PromptError: the template does not take the chat or writes nothing, or the conversation is too long.
        """
        ids = (
            self._text_ids(prompt, response) if prompt.chat is None else self._chat_ids(prompt.chat, response)
        )
        if not ids:
            raise PromptError(
                "is a conversation of no tokens for the reward model; look at its chat template"
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
                "prompts are chats.\nSave one with a chat_template beside the reward model; or, where the reward model "
                "was trained on the policy's own tokens, set reward_model.model.input_tokenizer to null."
            )
        messages = [*chat, {"role": "assistant", "content": response}]
        text = write_chat(messages, self.tokenizer, add_generation_prompt=False)
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _text_ids(self, prompt: Prompt, response: str) -> list[int]:
        text = prompt.text.removeprefix(self.written_bos or "") + response
        return one_start(self.tokenizer(text, verbose=False)["input_ids"], self.tokenizer)


def load_conversation_writer(run: RunConfig) -> ConversationWriter | None:
    """Load what writes the conversations that the reward model reads; None where it reads the policy's own tokens.

    That is so if `input_tokenizer` is None, or if the run has no reward model. Otherwise its value does not matter: the
    responses are text by then, which the tokenizer that the policy works with made of them.

    Raises:
        ConfigError: a tokenizer cannot be read, or sequences are to be cut to `reward_model.max_length` that are not
            written anew.
    """
    asked = run.rewards.conversation
    if asked is None:
        return None
    if asked.input_tokenizer is not None:
        written_bos = load_tokenizer(run).bos_token
        return ConversationWriter(
            load_reward_tokenizer(run.roles["reward"]),
            written_bos if isinstance(written_bos, str) else None,
            asked.max_length,
            asked.truncation,
        )
    longest = run.rollout.prompt_length + run.rollout.response_length
    if asked.max_length is not None and asked.max_length < longest:
        raise ConfigError(
            f"reward_model.max_length is {asked.max_length}, and with reward_model.model.input_tokenizer: null the "
            f"model reads prompt and response as they are, up to {longest} tokens.\n"
            "Set reward_model.max_length to null, or data.max_prompt_length and data.max_response_length to less."
        )
    return None


def to_reward_tokens(rollout: Rollout, writer: ConversationWriter) -> TokenSequence | Failed:
    """Write the whole conversation in the reward model's tokens, none of them trained.

    A conversation that cannot be written, or is too long if nothing may be cut off (`reward_model.truncation: error`),
    is a failure of the kind `function`.

    Raises:
        ConfigError: the prompt is a chat, and the reward model's tokenizer has no chat template.
    """
    try:
        return TokenSequence.untrained(writer.ids(rollout.prompt, rollout.text))
    except PromptError as error:
        return Failed("function", detail=f"row {rollout.prompt.row} of the dataset: the prompt {error}")


def check_conversations(writer: ConversationWriter, prompts: Iterable[Prompt]) -> None:
    """See that prompts, with a word for a response, can be shown to the reward model.

    Raises:
        ConfigError: one cannot; names its row.
    """
    for prompt in prompts:
        try:
            writer.ids(prompt, "answer")
        except PromptError as error:
            raise ConfigError(f"row {prompt.row} of the dataset: the prompt {error}") from error
