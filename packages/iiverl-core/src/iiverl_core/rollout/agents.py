"""Rollouts that any program makes which speaks the OpenAI API."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from iiverl_core import activity
from iiverl_core.data.chat import PromptError
from iiverl_core.data.images import with_image_parts
from iiverl_core.message_parts import data_url
from iiverl_core.registry import TOOL_FORMATS
from iiverl_core.rollout.agent_pool import AgentPool
from iiverl_core.rollout.engine import Completion
from iiverl_core.rollout.environments import row_of, seed_of
from iiverl_core.rollout.openai_endpoint import Endpoint
from iiverl_core.rollout.openai_messages import Answer, APIError, ChatRequest, TextRequest
from iiverl_core.rollout.process_pool import EnvironmentFailure
from iiverl_core.rollout.rollouter import Generate, RolloutRequest, RolloutTokens
from iiverl_core.rollout.turn_images import TurnImages
from iiverl_core.rollout.turns import Conversation, Message, TurnTemplate
from iiverl_core.samples import ImageInputs, Prompt, SampledTurn, SequenceImage, TokenSequence
from iiverl_reward_client import Failed, Outcome, Scored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from iiverl_core.config import RunConfig
    from iiverl_core.data.images import ImageProcessor
    from iiverl_core.rollout.tool_calls import ToolFormat

logger = logging.getLogger(__name__)

T = TypeVar("T")

OUTPUT = "agent.log"
"""File of the run's folder with what agents print."""


class AgentRollouter:
    """A program of the user's, whose requests to the model are the rollout. Implements `Rollouter`.

    A request whose messages go on after a response of the model continues the tokens of that conversation. Any other
    begins a conversation, which is a further sequence of the rollout. A sequence has as many tokens as
    `data.max_prompt_length` and `data.max_response_length` allow together. A request whose client goes away before its
    answer leaves nothing behind, and may be made again.
    """

    def __init__(
        self, run: RunConfig, tokenizer: PreTrainedTokenizerBase, images: ImageProcessor | None = None
    ) -> None:
        """Prepare; the first rollouts start the server and processes. `images` is the processor of a policy that reads images.

        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        turns = run.rollout.multi_turn
        self._policy = _Policy(
            TurnTemplate(tokenizer, run.data.apply_chat_template_kwargs, images),
            TurnImages(images),
            TOOL_FORMATS[turns.format].load(),
            run.rollout.prompt_length + run.rollout.response_length,
            turns.max_turn_length,
            {
                "temperature": run.rollout.temperature,
                "top_p": run.rollout.top_p,
                "top_k": run.rollout.top_k,
                "min_p": 0.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "repetition_penalty": 1.0,
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
        row = agent_row(request.prompt, seed)
        agent = asyncio.ensure_future(self._pool.call(address.base_url, address.api_key, row, str(seed)))
        outcome: Outcome | None = None
        try:
            await asyncio.wait({agent, session.fault}, return_when=asyncio.FIRST_COMPLETED)
            if session.fault.done():
                session.fault.result()
            ended = await agent
            if not session.answered:
                raise EnvironmentFailure("the agent ended without a response of the model")
            if ended.reward is not None:
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
    images: TurnImages
    format: ToolFormat
    max_sequence: int
    max_turn: int | None
    sampling: Mapping[str, float]
    reported: set[str] = field(default_factory=set)

    def report_ignored(self, asked: Mapping[str, float]) -> None:
        """Tell once about each parameter of requests that differs from the run's, which is used in its place."""
        for name, value in asked.items():
            if value != self.sampling[name] and name not in self.reported:
                self.reported.add(name)
                logger.warning(
                    "agents ask for %s=%g, but responses are sampled as the run says (%g), as training needs",
                    name,
                    value,
                    self.sampling[name],
                )


@dataclass(eq=False)
class _Talk:
    """A conversation of a rollout, with the tools that its requests offer.

    `keys` has the key of each message, as requests have them. `response` is the response after which messages can be added, None if the last messages have none. A conversation that
    is `busy` is being answered, or its template has failed.
    """

    conversation: Conversation
    tools: Sequence[Mapping[str, Any]]
    keys: list[tuple[Any, ...]]
    response: Completion | None = None
    busy: bool = False


class _Text:
    """A text or tokens, and the response to it."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.prompt_ids = prompt_ids
        self.response: Completion | None = None


class RolloutSession:
    """The requests of one rollout. Implements `openai_endpoint.Session`; used on one event loop."""

    def __init__(self, policy: _Policy, generate: Generate) -> None:
        self._policy, self._generate = policy, generate
        self._talks: list[_Talk | _Text] = []
        self._prepared: dict[str, list[ImageInputs]] = {}  # by the URL of the image
        self._last = np.empty(0, dtype=np.int64)
        self._full = self._ended = False
        self._running: set[asyncio.Task[Any]] = set()
        self.fault: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Gets the exception if answering fails by a bug or the engine's end, not by what the agent asks."""

    @property
    def answered(self) -> bool:
        """Whether there is a response."""
        return any(
            talk.response is not None if isinstance(talk, _Text) else talk.conversation.turns
            for talk in self._talks
        )

    async def chat(self, request: ChatRequest) -> list[Answer]:
        """See `Session.chat`."""
        with self._serving(request):
            await self._prepare_images(request.messages)
            talks = [self._continued(request) or self._begun(request)]
            try:
                talks += [self._begun(request) for _ in range(request.n - 1)]
            except APIError:
                talks[0].busy = False
                raise
            return await self._all([self._answer(talk, request) for talk in talks])

    async def complete(self, request: TextRequest) -> list[Answer]:
        """See `Session.complete`."""
        with self._serving(request):
            texts = [_Text(self._encoded(prompt)) for prompt in request.prompts for _ in range(request.n)]
            self._talks += texts
            return await self._all([self._answer_text(text, request) for text in texts])

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
        images: list[ImageInputs] = []
        for talk in self._talks:
            if isinstance(talk, _Text):
                if (done := talk.response) is None:
                    continue
                prompt = {"role": "user", "content": self._policy.template.decode(talk.prompt_ids)}
                turns.append(SampledTurn(len(messages) + 1, len(done.token_ids)))
                messages += [prompt, self._message_of(done)]
                sequences.append(
                    TokenSequence.single_turn(talk.prompt_ids, done.token_ids, done.log_probs, done.kept)
                )
            elif talk.conversation.turns:
                start = len(messages)
                turns += [replace(turn, message=start + turn.message) for turn in talk.conversation.turns]
                messages += talk.conversation.messages
                sequences += talk.conversation.sequences
                images += talk.conversation.seen
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
            images=tuple(images),
        )

    @contextmanager
    def _serving(self, request: ChatRequest | TextRequest) -> Iterator[None]:
        """Serve a request: if it is invalid, the agent gets an error; any other problem is a fault."""
        if self._ended:
            raise APIError("The rollout has ended.", status=404, code="rollout_ended")
        self._policy.report_ignored(request.sampling or {})
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            yield
        except APIError:
            raise
        except PromptError as error:
            raise APIError(f"The conversation {error}") from error
        except RecursionError as error:
            raise APIError("The messages or the tools are nested too deeply.") from error
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
        """Return the conversation that a request continues, with its further messages, if there is one.

        A request without further messages asks again for a response that its client has not waited for.
        """
        keys = [_key(message) for message in request.messages]
        for talk in self._talks:
            if isinstance(talk, _Text) or talk.busy or talk.tools != request.tools:
                continue
            known = len(talk.keys)
            further = request.messages[known:]
            if keys[:known] != talk.keys or bool(further) != (talk.response is not None):
                continue
            talk.busy = True
            if further:
                talk.response = None
                talk.keys += keys[known:]
                talk.conversation.add_messages(*self._with_images(further))
            return talk
        return None

    def _begun(self, request: ChatRequest) -> _Talk:
        messages, images = self._with_images(request.messages)
        conversation = Conversation(self._policy.template, messages, tools=request.tools, images=images)
        self._room(conversation.ids)
        talk = _Talk(conversation, request.tools, [_key(message) for message in request.messages], busy=True)
        self._talks.append(talk)
        return talk

    async def _prepare_images(self, messages: Sequence[Message]) -> None:
        """Prepare the images of messages that this rollout has not had before."""
        for part in _image_parts(messages):
            if part["image"] not in self._prepared:
                _, self._prepared[part["image"]] = await self._policy.images.read([part])

    def _with_images(self, messages: Sequence[Message]) -> tuple[list[Message], list[ImageInputs]]:
        """Return messages as chat templates take them, and their images."""
        images = [image for part in _image_parts(messages) for image in self._prepared[part["image"]]]
        shown = [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [_without_image(part) for part in message["content"]]}
            for message in messages
        ]
        return shown, images

    async def _answer(self, talk: _Talk, request: ChatRequest) -> Answer:
        prompt_ids = list(talk.conversation.ids)
        try:
            done = await self._sampled(prompt_ids, request.max_tokens, talk.conversation.images)
        finally:
            talk.busy = False
        before = sum(len(message.get("tool_calls", ())) for message in talk.conversation.messages)

        def read(text: str) -> Message:
            return self._policy.format(text, before).message

        message = talk.conversation.add_response(done, read if request.reads_calls else None)
        talk.keys.append(_key(message))
        talk.response = done
        return self._told(message, done, len(prompt_ids), request.log_probs)

    async def _answer_text(self, text: _Text, request: TextRequest) -> Answer:
        done = text.response = await self._sampled(text.prompt_ids, request.max_tokens)
        return self._told(self._message_of(done), done, len(text.prompt_ids), request.log_probs)

    async def _sampled(
        self, prompt_ids: Sequence[int], asked: int | None, images: Sequence[SequenceImage] = ()
    ) -> Completion:
        room = self._room(prompt_ids)
        most = min(each for each in (room, asked, self._policy.max_turn) if each is not None)
        done = await self._generate(prompt_ids, max_tokens=most, images=images)
        self._full = len(done.token_ids) == room and done.finish_reason == "length"
        self._last = done.token_ids
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

    def _message_of(self, done: Completion) -> Message:
        text = self._policy.template.decode(done.token_ids.tolist(), skip_special_tokens=True)
        return {"role": "assistant", "content": text}

    def _told(self, message: Message, done: Completion, prompt_tokens: int, log_probs: bool) -> Answer:
        ids = done.token_ids.tolist()
        answer = Answer(message, done.finish_reason, prompt_tokens, len(ids))
        if not log_probs:
            return answer
        tokens = [self._policy.template.decode([id]) for id in ids]
        return replace(answer, tokens=tokens, log_probs=done.log_probs.tolist())


def agent_row(prompt: Prompt, seed: int) -> dict[str, Any]:
    """Return a row as agents get it: as `row_of`, with the images in the messages of the prompt, as in the OpenAI API."""
    row = row_of(prompt, seed)
    images = iter(row.pop("images"))
    if prompt.images and prompt.chat is not None:
        row["prompt"] = [
            message
            if isinstance(message["content"], str)
            else {**message, "content": [_written_part(part, images) for part in message["content"]]}
            for message in with_image_parts(row["prompt"])
        ]
    return row


def _written_part(part: Mapping[str, Any], images: Iterator[bytes]) -> Mapping[str, Any]:
    """Return a part of content for the OpenAI API; one without an image gets the next of `images`."""
    if part["type"] != "image":
        return part
    return {"type": "image_url", "image_url": {"url": data_url(next(images))}}


def _image_parts(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    return [
        part
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def _without_image(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"type": "image"} if part["type"] == "image" else part


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
