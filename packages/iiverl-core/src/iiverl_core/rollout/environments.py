"""Rollouts of several turns with an environment of the user's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import zip_longest
from math import fsum
from typing import TYPE_CHECKING, Any

import numpy as np

from iiverl_core.columns import extra_info_of
from iiverl_core.data.chat import PromptError, as_tools
from iiverl_core.rollout.environment_pool import EnvironmentPool, OpenEnvironment
from iiverl_core.rollout.process_pool import EnvironmentFailure
from iiverl_core.rollout.rollouter import Generate, RolloutRequest, RolloutTokens
from iiverl_core.rollout.turn_images import TurnImages, prompt_messages
from iiverl_core.rollout.turns import Conversation, TurnTemplate
from iiverl_core.samples import TURN_REWARDS, FinishReason, Prompt, SampledTurn, TokenSequence
from iiverl_reward_client import Failed, Outcome, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from iiverl_core.config import RunConfig
    from iiverl_core.data.images import ImageProcessor

OUTPUT = "environment.log"
"""File of the run's folder with what environments print."""


class EnvironmentRollouter:
    """A conversation between the model and an environment. Implements `Rollouter`.

    It ends when the environment is done, at the limits of turns, or when no more tokens fit into
    `data.max_response_length`. The score is the sum of the turns' rewards, each of which is credited to the last token of
    its turn (`TURN_REWARDS`).
    """

    def __init__(
        self, run: RunConfig, tokenizer: PreTrainedTokenizerBase, images: ImageProcessor | None = None
    ) -> None:
        """Prepare; the first rollouts start processes. `images` is the processor of a policy that reads images.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        self._template = TurnTemplate(tokenizer, run.data.apply_chat_template_kwargs, images)
        self._images = TurnImages(images)
        self._tools_key, self._limits = run.data.tools_key, run.rollout.multi_turn
        self._max_prompt, self._max_rest = run.rollout.prompt_length, run.rollout.response_length
        self._pool = EnvironmentPool(self._limits.environment, run.folder / OUTPUT)
        self.concurrency = self._limits.environment.workers

    async def rollout(self, request: RolloutRequest, generate: Generate) -> RolloutTokens:
        """See `Rollouter.rollout`."""
        seed = seed_of(request)
        environment = self._pool.open(str(seed))
        talk = _Talk(request)
        try:
            first = await environment.reset(row_of(request.prompt, seed))
            talk.conversation = await self._begin(request, first)
            await self._converse(talk, environment, generate)
            talk.outcome = Scored(fsum(talk.rewards), talk.components, talk.info)
        except EnvironmentFailure as failure:
            talk.outcome = Failed("environment", detail=str(failure))
        except PromptError as error:
            talk.outcome = Failed("environment", detail=f"what the environment returned {error}")
        finally:
            environment.close()
        return talk.tokens(generate.weights_version)

    def close(self) -> None:
        """See `Rollouter.close`."""
        self._pool.close()

    async def _begin(
        self, request: RolloutRequest, first: Sequence[Mapping[str, Any]] | None
    ) -> Conversation:
        """Begin the conversation with the environment's first messages, or with the row's prompt."""
        prompt = request.prompt
        if first is None and prompt.chat is None:
            raise EnvironmentFailure(
                f"reset returned None, and the prompt of {prompt.place} is a text, not messages"
            )
        tools = as_tools(prompt.columns.get(self._tools_key or ""))
        if first is None:
            placed = {"prompt_ids": prompt.ids, "prompt_images": request.images}
            return Conversation(self._template, prompt_messages(request), tools=tools, **placed)
        messages, images = await self._images.read_messages(first)
        conversation = Conversation(self._template, messages, tools=tools, images=images)
        if len(conversation.ids) > self._max_prompt:
            raise EnvironmentFailure(
                f"reset returned messages of {len(conversation.ids)} tokens; data.max_prompt_length is {self._max_prompt}"
            )
        return conversation

    async def _converse(self, talk: _Talk, environment: OpenEnvironment, generate: Generate) -> None:
        """Alternate between the model and the environment until one of the limits, or the environment, says so."""
        conversation, limits = talk.conversation, self._limits
        assert conversation is not None
        full = len(conversation.ids) + self._max_rest
        answers = 0
        while (room := full - len(conversation.ids)) > 0:
            most = min(room, limits.max_turn_length or room)
            response = await generate(conversation.ids, max_tokens=most, images=conversation.images)
            talk.response_ids = response.token_ids
            answered = await environment.step(conversation.add_response(response))
            talk.rewards.append(float(np.float32(answered.reward)))
            talk.components |= answered.components
            talk.info |= answered.info
            if (
                answered.done
                or len(talk.rewards) == limits.max_assistant_turns
                or answers == limits.max_user_turns
            ):
                return
            answers += 1
            conversation.add_messages(*await self._images.read_messages(answered.messages))
        talk.finish_reason = "length"


@dataclass
class _Talk:
    """A rollout so far."""

    request: RolloutRequest
    conversation: Conversation | None = None
    response_ids: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    finish_reason: FinishReason = "stop"
    rewards: list[float] = field(default_factory=list)
    components: dict[str, float] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    outcome: Outcome | None = None

    def tokens(self, weights_version: int) -> RolloutTokens:
        sequences: tuple[TokenSequence, ...] = ()
        messages: tuple[Mapping[str, Any], ...] = ()
        turns: list[SampledTurn] = []
        if self.conversation:
            sequences, messages = self.conversation.sequences, tuple(self.conversation.messages)
            turns = [
                replace(turn, reward=reward)
                for turn, reward in zip_longest(self.conversation.turns, self.rewards)
            ]
        if isinstance(self.outcome, Scored):
            sequences = credited(sequences, turns)
        return RolloutTokens(
            self.request.id,
            self.request.prompt,
            sequences,
            self.response_ids,
            self.finish_reason,
            weights_version,
            self.outcome,
            messages,
            tuple(turns),
            images=self.conversation.seen if self.conversation else (),
        )


def credited(sequences: Sequence[TokenSequence], turns: Iterable[SampledTurn]) -> tuple[TokenSequence, ...]:
    """Add `TURN_REWARDS` to the sequences of a rollout, whose `turns` were sampled in this order."""
    waiting, credited = iter(turns), []
    for sequence in sequences:
        rewards = np.zeros(sequence.trained, dtype=np.float32)
        end = 0
        while end < len(rewards):
            turn = next(waiting)
            end += turn.tokens
            rewards[end - 1] += turn.reward or 0.0
        credited.append(replace(sequence, extras={**sequence.extras, TURN_REWARDS: rewards}))
    return tuple(credited)


def row_of(prompt: Prompt, seed: int) -> dict[str, Any]:
    """Return a row as environments get it."""
    return {
        "prompt": prompt.text if prompt.chat is None else [dict(message) for message in prompt.chat],
        "data_source": prompt.data_source,
        "ground_truth": prompt.ground_truth,
        "extra_info": extra_info_of(prompt.columns),
        "seed": seed,
        "images": list(prompt.images),
    }


def seed_of(request: RolloutRequest) -> int:
    """Derive a seed of 31 bits that depends on the rollout alone."""
    digest = blake2b(f"{request.seed}/environment {request.id.member}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1
