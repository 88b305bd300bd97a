"""The environment of a rollout of several turns: a class of the user's that answers the model.

    from iiverl_core.environment import Turn


    class Environment:
        def reset(self, row):
            self.word = row["ground_truth"]
            return [{"role": "user", "content": f"Write the word that has {len(self.word)} letters."}]

        def step(self, message):
            right = message["content"] == self.word
            return Turn("Try again.", reward=float(right), done=right)

This module imports nothing, since every environment's process imports it.
"""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""A message of a chat: `role`, `content`, and what else the chat template reads.

`content` is a text, or for a model that reads images a list of texts and images: objects of Pillow, or parts as in the
OpenAI API, `{"type": "image", "image": …}` with bytes, a path or a base64 data URL.
"""


@dataclass(frozen=True, slots=True)
class Turn:
    """An environment's answer to a message of the model.

    `messages` come next in the conversation; a string is a message of the user. `reward` is for the model's message; it
    is credited to its last token, and the score of a rollout is the sum. `done` ends the rollout. Numbers in `info` become
    components of the score, each with a metric.
    """

    messages: Sequence[Message] | str = ()
    reward: float = 0.0
    done: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)


class Environment(Protocol):
    """One rollout's environment. Methods may be coroutines.

    An object is made per rollout, from `multi_turn.environment.kwargs`. Its calls come one after another from one process
    that runs no other environment meanwhile, and the global random numbers that it draws depend on the rollout alone. An
    exception leaves the rollout without a score. A method `close()`, if there is one, is called at the end, whatever
    happened.
    """

    def reset(
        self, row: Mapping[str, Any]
    ) -> Sequence[Message] | str | Awaitable[Sequence[Message] | str | None] | None:
        """Begin, and return the messages that the model answers first; a string is a message of the user.

        None stands for the row's prompt. `row` has `prompt` (messages, or a text), `data_source`, `ground_truth`,
        `extra_info` (the row's other columns, as a reward function gets them), `images` (encoded) and `seed`, an integer
        that depends on the rollout alone.
        """
        ...

    def step(self, message: Message) -> Turn | Awaitable[Turn]:
        """Answer the model's message, whose `content` is its text."""
        ...
