"""Rollouts as a reward model with a tokenizer of its own reads them."""

from collections.abc import Iterable

from iiverl_core.data import ConversationWriter
from iiverl_core.data.chat import PromptError
from iiverl_core.errors import ConfigError
from iiverl_core.samples import Prompt, Rollout, TokenSequence
from iiverl_reward_client import Failed


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
