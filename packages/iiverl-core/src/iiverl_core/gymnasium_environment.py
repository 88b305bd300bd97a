"""Environments of gymnasium as environments of rollouts; needs `iiverl[gymnasium]`.

multi_turn:
  environment:
    name: iiverl_core.gymnasium_environment:GymnasiumEnvironment
    kwargs: {id: FrozenLake-v1, render_mode: ansi, actions: [left, down, right, up]}
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium
from gymnasium.spaces import Discrete, Text

from iiverl_core.environment import Message, Turn

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class GymnasiumEnvironment:
    """An environment of gymnasium whose observations and actions are text. Implements `iiverl_core.environment.Environment`.

    Observations have to be strings, unless `render_mode` is "ansi": then the model sees what `render` returns, without
    colours. The first one follows the row's prompt, in the same message. The model's whole message, without the space around
    it, is the action: a text that the action space `Text` contains, or for `Discrete` a number, or one of the names in
    `actions`. Anything else is answered with what is allowed, has no reward, and is counted in `reward/invalid_actions/mean`.
    Every episode is seeded by its rollout.
    """

    def __init__(self, id: str, actions: Sequence[str] | None = None, **kwargs: Any) -> None:
        """Make the environment.

        Args:
            id: its name in gymnasium's registry; `module:NAME` imports the module first.
            actions: names of the actions of a `Discrete` space, in its order; None for numbers.
            kwargs: further arguments of `gymnasium.make`.

        Raises:
            ValueError: neither observations nor renderings are text, or actions are something else.
        """
        self._env = gymnasium.make(id, **kwargs)
        space: Any = self._env.action_space
        self._rendered = self._env.render_mode == "ansi"
        self._invalid = 0
        if not self._rendered and not isinstance(self._env.observation_space, Text):
            raise ValueError(
                f"the observations of {id} are {self._env.observation_space}, not text; if it can render text, set "
                "render_mode to ansi"
            )
        if not isinstance(space, Text | Discrete):
            raise ValueError(f"the actions of {id} are {space}, not text or one of several")
        if actions is not None and not (isinstance(space, Discrete) and len(actions) == space.n):
            raise ValueError(f"{len(actions)} actions have names, and the actions of {id} are {space}")
        self._space: Text | Discrete[Any] = space
        self._actions = actions

    def reset(self, row: Mapping[str, Any]) -> Sequence[Message]:
        """Begin an episode; its first observation follows the row's prompt."""
        observation, _ = self._env.reset(seed=row["seed"])
        text, prompt = self._text(observation), row["prompt"]
        if isinstance(prompt, str):
            return [{"role": "user", "content": f"{prompt}\n\n{text}"}]
        *before, last = prompt
        return [*before, {**last, "content": f"{last['content']}\n\n{text}"}]

    def step(self, message: Message) -> Turn:
        """Take the action that the message names."""
        action = self._action(str(message["content"]).strip())
        if action is None:
            self._invalid += 1
            return Turn(f"Invalid action: {self._allowed()}.", info={"invalid_actions": self._invalid})
        observation, reward, terminated, truncated, info = self._env.step(action)
        return Turn(
            self._text(observation),
            float(reward),
            bool(terminated or truncated),
            {**info, "invalid_actions": self._invalid},
        )

    def close(self) -> None:
        """Close the environment."""
        self._env.close()

    def _text(self, observation: Any) -> str:
        return _COLOUR.sub("", str(self._env.render())) if self._rendered else observation

    def _action(self, text: str) -> Any:
        """Return the action that a text names; None if it names none."""
        if isinstance(self._space, Text):
            return text if text in self._space else None
        first, count = int(self._space.start), int(self._space.n)
        if self._actions is not None:
            return first + self._actions.index(text) if text in self._actions else None
        number = int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else first - 1
        return number if first <= number < first + count else None

    def _allowed(self) -> str:
        space = self._space
        if self._actions is not None:
            return f"write one of {', '.join(self._actions)}"
        if isinstance(space, Discrete):
            return f"write a number from {space.start} to {space.start + space.n - 1}"
        return f"write {space.min_length} to {space.max_length} of the characters {space.characters}"
