"""Rollouts that any program makes which speaks the OpenAI API."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from iiverl_core import activity
from iiverl_core.data.chat import PromptError
from iiverl_core.errors import ConfigError
from iiverl_core.registry import TOOL_FORMATS
from iiverl_core.rollout.agent_pool import AgentPool
from iiverl_core.rollout.engine import Completion
from iiverl_core.rollout.environments import row_of, seed_of
from iiverl_core.rollout.openai_endpoint import (
    Answer,
    APIError,
    ChatRequest,
    Endpoint,
    TextRequest,
)
from iiverl_core.rollout.process_pool import EnvironmentFailure
from iiverl_core.rollout.rollouter import Generate, RolloutRequest, RolloutTokens
from iiverl_core.rollout.turns import Conversation, Message, TurnTemplate
from iiverl_core.samples import SampledTurn, TokenSequence
from iiverl_reward_client import Failed, Outcome, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from iiverl_core.config import RunConfig
    from iiverl_core.rollout.tool_calls import ToolFormat

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUTPUT = "agent.log"
"""File of the run's folder with what agents print."""


class AgentRollouter:
    """A program of the user's, whose requests to the model are the rollout. Implements `Rollouter`.

    A request whose messages go on after a response of the model continues the tokens of that conversation. Any other
    begins a conversation, which is a further sequence of the rollout. A sequence has as many tokens as
    `data.max_prompt_length` and `data.max_response_length` allow together.
    """

    def __init__(self, run: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare; the first rollouts start the server and processes.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        if not tokenizer.chat_template:
            raise ConfigError(
                f"The tokenizer {tokenizer.name_or_path} has no chat template, which an agent's messages need.\n"
                "Set data.tokenizer to the tokenizer of an instruct model of the same family."
            )
        turns = run.rollout.multi_turn
        self._policy = _Policy(
            TurnTemplate(tokenizer, run.data.apply_chat_template_kwargs),
            TOOL_FORMATS[turns.format].load(),
            run.rollout.prompt_length + run.rollout.response_length,
            turns.max_turn_length,
            {
                "temperature": run.rollout.temperature,
                "top_p": run.rollout.top_p,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
            },
        )
        self._pool = AgentPool(turns.agent, run.folder / OUTPUT)
        self._endpoint = Endpoint()
        self.concurrency = turns.agent.workers

    async def rollout(self, request: RolloutRequest, generate: Generate) -> RolloutTokens:
        """See `Rollouter.rollout`."""
        seed = seed_of(request)
        session = RolloutSession(self._policy, generate)
        address = self._endpoint.open(_name(request), session)
        row = row_of(request.prompt, seed)
        agent = asyncio.ensure_future(self._pool.call(address.base_url, address.api_key, row, str(seed)))
        try:
            await asyncio.wait({agent, session.fault}, return_when=asyncio.FIRST_COMPLETED)
            if session.fault.done():
                session.fault.result()
            ended = await agent
            outcome = None
            if not session.turns:
                outcome = Failed("environment", detail="the agent ended without a response of the model")
            elif ended.reward is not None:
                outcome = Scored(ended.reward, ended.components, ended.info)
        except EnvironmentFailure as failure:
            outcome = Failed("environment", detail=str(failure))
        finally:
            self._endpoint.end(address)
            agent.cancel()
            await session.end()
            await asyncio.wait({agent})
        return session.tokens(request, outcome)

    def close(self) -> None:
        """See `Rollouter.close`."""
        self._pool.close()
        self._endpoint.close()


@dataclass
class _Policy:
    """What all rollouts share: how messages become tokens and back, and the limits of tokens."""

    template: TurnTemplate
    format: ToolFormat
    max_sequence: int
    max_turn: int | None
    sampling: Mapping[str, float]
    told: bool = False


class _Talk:
    """A conversation of a rollout, with the tools that its requests offer."""

    def __init__(self, conversation: Conversation, tools: Sequence[Mapping[str, Any]]) -> None:
        self.conversation, self.tools = conversation, tools
        self.answered = False
        """Whether the last message is a response, so that messages can be added."""


class _Text:
    """A response to a text or to tokens."""

    def __init__(self, template: TurnTemplate, prompt_ids: Sequence[int], completion: Completion) -> None:
        self.prompt_ids, self.completion = prompt_ids, completion
        self.prompt = {"role": "user", "content": template.decode(prompt_ids)}
        text = template.decode(completion.token_ids.tolist(), skip_special_tokens=True)
        self.message = {"role": "assistant", "content": text}


class RolloutSession:
    """The requests of one rollout. Implements `openai_endpoint.Session`; used on one event loop."""

    def __init__(self, policy: _Policy, generate: Generate) -> None:
        self._policy, self._generate = policy, generate
        self._talks: list[_Talk | _Text] = []
        self._last = np.empty(0, dtype=np.int64)
        self._full = self._ended = False
        self._running: set[asyncio.Task[Any]] = set()
        self.turns = 0
        """Responses so far."""
        self.fault: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception if answering fails by a bug or the engine's end, not by what the agent asks."""

    async def chat(self, request: ChatRequest) -> list[Answer]:
        """See `Session.chat`."""
        with self._serving():
            talks = [self._continued(request) or self._begun(request)]
            talks += [self._begun(request) for _ in range(request.n - 1)]
            return await self._all([self._answer(talk, request) for talk in talks])

    async def complete(self, request: TextRequest) -> list[Answer]:
        """See `Session.complete`."""
        with self._serving():
            prompts = [self._encoded(prompt) for prompt in request.prompts for _ in range(request.n)]
            completions = await self._all([self._sampled(ids, request.max_tokens) for ids in prompts])
            texts = [_Text(self._policy.template, *each) for each in zip(prompts, completions, strict=True)]
            self._talks += texts
            return [self._told(text.message, text.completion, text.prompt_ids) for text in texts]

    def ignores(self, name: str, value: float) -> None:
        """See `Session.ignores`; told once per run."""
        wanted = self._policy.sampling[name]
        if value != wanted and not self._policy.told:
            self._policy.told = True
            logger.warning(
                "an agent asks for %s=%g, but responses are sampled as the run says (%g), as training needs",
                name,
                value,
                wanted,
            )

    async def end(self) -> None:
        """Refuse further requests, and drop those that are being answered."""
        self._ended = True
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    def tokens(self, request: RolloutRequest, outcome: Outcome | None) -> RolloutTokens:
        """Return the rollout: the conversations one after another, each a sequence or several."""
        sequences: list[TokenSequence] = []
        messages: list[Message] = []
        turns: list[SampledTurn] = []
        for talk in self._talks:
            if isinstance(talk, _Text):
                done = talk.completion
                turns.append(SampledTurn(len(messages) + 1, len(done.token_ids)))
                messages += [talk.prompt, talk.message]
                sequences.append(
                    TokenSequence.single_turn(talk.prompt_ids, done.token_ids, done.log_probs, done.kept)
                )
            elif talk.conversation.turns:
                start = len(messages)
                turns += [replace(turn, message=start + turn.message) for turn in talk.conversation.turns]
                messages += talk.conversation.messages
                sequences += talk.conversation.sequences
        return RolloutTokens(
            request.id,
            request.prompt,
            tuple(sequences),
            self._last,
            "length" if self._full else "stop",
            self._generate.weights_version,
            outcome,
            tuple(messages),
            tuple(turns),
        )

    @contextmanager
    def _serving(self) -> Iterator[None]:
        """Serve a request: what it asks wrongly is told to the agent, anything else is a fault."""
        if self._ended:
            raise APIError("The rollout has ended.", status=404, code="rollout_ended")
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            yield
        except APIError:
            raise
        except PromptError as error:
            raise APIError(f"The conversation {error}") from error
        except Exception as error:
            if not self.fault.done():
                self.fault.set_exception(error)
            raise APIError("The run ends.", status=500) from error
        finally:
            self._running.discard(task)

    async def _all(self, coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        """Await all; if one fails, cancel the others."""
        tasks = [asyncio.ensure_future(each) for each in coroutines]
        self._running.update(tasks)
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            self._running.difference_update(task for task in tasks if task.done())

    def _continued(self, request: ChatRequest) -> _Talk | None:
        """Add a request's further messages to the conversation that it continues, if there is one."""
        keys = [_key(message) for message in request.messages]
        for talk in self._talks:
            if isinstance(talk, _Text) or not talk.answered or talk.tools != request.tools:
                continue
            known = [_key(message) for message in talk.conversation.messages]
            if len(known) < len(keys) and keys[: len(known)] == known:
                talk.answered = False
                talk.conversation.add_messages(request.messages[len(known) :])
                self._room(talk.conversation.ids)
                return talk
        return None

    def _begun(self, request: ChatRequest) -> _Talk:
        talk = _Talk(
            Conversation(self._policy.template, request.messages, tools=request.tools), request.tools
        )
        self._room(talk.conversation.ids)
        self._talks.append(talk)
        return talk

    async def _answer(self, talk: _Talk, request: ChatRequest) -> Answer:
        prompt_ids = list(talk.conversation.ids)
        done = await self._sampled(prompt_ids, request.max_tokens)
        read = None
        if request.reads_calls:
            before = sum(len(message.get("tool_calls", ())) for message in talk.conversation.messages)

            def read(text: str) -> Message:
                return self._policy.format(text, before).message

        message = talk.conversation.add_response(done, read)
        talk.answered = True
        return self._told(message, done, prompt_ids)

    async def _sampled(self, prompt_ids: Sequence[int], asked: int | None) -> Completion:
        room = self._room(prompt_ids)
        most = min(each for each in (room, asked, self._policy.max_turn) if each is not None)
        done = await self._generate(prompt_ids, max_tokens=most)
        self._full = self._full or len(done.token_ids) == room
        self._last = done.token_ids
        self.turns += 1
        activity.advance()
        return done

    def _room(self, ids: Sequence[int]) -> int:
        """Return how many tokens may follow.

        Raises:
            APIError: none.
        """
        room = self._policy.max_sequence - len(ids)
        if room <= 0:
            self._full = True
            raise APIError(
                f"The maximum context length is {self._policy.max_sequence} tokens, and the prompt has {len(ids)}.",
                code="context_length_exceeded",
            )
        return room

    def _encoded(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self._policy.template.tokenizer
        ids = prompt if isinstance(prompt, list) else list(tokenizer(prompt, verbose=False)["input_ids"])
        if not ids or not all(0 <= id < len(tokenizer) for id in ids):
            raise APIError("The prompt is empty, or has a token that the model does not know.")
        return ids

    def _told(self, message: Message, done: Completion, prompt_ids: Sequence[int]) -> Answer:
        template = self._policy.template
        tokens = [template.decode([id]) for id in done.token_ids.tolist()]
        return Answer(message, done.finish_reason, len(prompt_ids), tokens, done.log_probs.tolist())


def _key(message: Message) -> tuple[Any, ...]:
    """Return what makes a message the same, whoever wrote it down."""
    calls = [
        (call["id"], call["function"]["name"], json.dumps(call["function"]["arguments"], sort_keys=True))
        for call in message.get("tool_calls", ())
    ]
    return message["role"], message["content"], message.get("name"), message.get("tool_call_id"), calls


def _name(request: RolloutRequest) -> str:
    """Return a part of a URL that no other rollout has at the same time."""
    return "-".join(str(part) for part in request.id)
