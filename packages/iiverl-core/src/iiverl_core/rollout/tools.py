"""Rollouts of several turns in which the model calls tools of the user's."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from iiverl_core.data.chat import PromptError
from iiverl_core.errors import ConfigError
from iiverl_core.message_parts import text_of
from iiverl_core.registry import TOOL_FORMATS
from iiverl_core.rollout.process_pool import EnvironmentFailure
from iiverl_core.rollout.rollouter import Generate, RolloutRequest, RolloutTokens, turn_seed
from iiverl_core.rollout.tool_calls import BadCall, ReadResponse, ToolCall, ToolFormat
from iiverl_core.rollout.tool_pool import ToolPool
from iiverl_core.rollout.turn_images import TurnImages, prompt_messages
from iiverl_core.rollout.turns import Conversation, TurnTemplate
from iiverl_core.samples import FinishReason, ImageInputs
from iiverl_core.tool_process import Result
from iiverl_reward_client import Failed, Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from iiverl_core.config import RunConfig
    from iiverl_core.data.images import ImageProcessor

logger = logging.getLogger(__name__)

OUTPUT = "tools.log"
"""File of the run's folder with what tools print."""


class ToolRollouter:
    """Turns in which the model may call functions. Implements `Rollouter`.

    The calls of a response run in parallel, and their results are messages to the model. So are their errors: an unknown
    function, wrong arguments, an exception, or a call that takes too long or cannot be read. A rollout ends with a
    response without calls, at the limits of turns, or when no more tokens fit into `data.max_response_length`.
    """

    concurrency: int | None = None

    def __init__(
        self, run: RunConfig, tokenizer: PreTrainedTokenizerBase, images: ImageProcessor | None = None
    ) -> None:
        """Load the tools in a first process, which stays for their calls.

        `images` is the processor of a policy that reads images.

        Raises:
            ConfigError: a tool cannot be loaded, or the tokenizer has no chat template.
        """
        self._template = TurnTemplate(tokenizer, run.data.apply_chat_template_kwargs, images)
        self._images = TurnImages(images)
        self._limits = run.rollout.multi_turn
        self._max_prompt, self._max_rest = run.rollout.prompt_length, run.rollout.response_length
        info = TOOL_FORMATS[self._limits.format]
        self._read: ToolFormat = info.load()
        self._error_role = info.error_role
        self._pool = ToolPool(self._limits.tools, run.folder / OUTPUT)
        self._schemas = self._pool.schemas()
        self._names = [schema["function"]["name"] for schema in self._schemas]
        if not self._template.offers(self._schemas):
            logger.warning(
                "the chat template of %s does not tell the model about tools; the prompts have to",
                tokenizer.name_or_path,
            )

    async def rollout(self, request: RolloutRequest, generate: Generate) -> RolloutTokens:
        """See `Rollouter.rollout`.

        Raises:
            ConfigError: the prompt is a text, not messages.
        """
        loop = _Loop(request)
        try:
            loop.conversation = self._begin(request)
            await self._converse(loop, loop.conversation, generate)
        except EnvironmentFailure as failure:
            loop.outcome = Failed("environment", detail=str(failure))
        except PromptError as error:
            loop.outcome = Failed("environment", detail=f"the prompt {error}")
        return loop.tokens(generate.weights_version)

    def close(self) -> None:
        """See `Rollouter.close`."""
        self._pool.close()

    def _begin(self, request: RolloutRequest) -> Conversation:
        prompt = request.prompt
        if prompt.chat is None:
            raise ConfigError(
                f"{prompt.place}: the prompt is a text, and calls of tools need messages: a list of {{role, content}}."
            )
        messages = prompt_messages(request)
        text = self._template.render(messages, self._schemas)
        ids, images = self._template.encode_rendering(text, [image for _, image in request.images])
        if len(ids) > self._max_prompt:
            raise EnvironmentFailure(
                f"{prompt.place}: with its tools the prompt has {len(ids)} tokens, and data.max_prompt_length is "
                f"{self._max_prompt}"
            )
        placed = {"prompt_ids": ids, "prompt_images": images}
        return Conversation(self._template, messages, tools=self._schemas, **placed)

    async def _converse(self, loop: _Loop, conversation: Conversation, generate: Generate) -> None:
        """Alternate between the model and its tools."""
        limits, full = self._limits, len(conversation.ids) + self._max_rest
        answers = 0
        while (room := full - len(conversation.ids)) > 0:
            most = min(room, limits.max_turn_length or room)
            response = await generate(conversation.ids, max_tokens=most, images=conversation.images)
            loop.response_ids, loop.finish_reason = response.token_ids, response.finish_reason
            read = _Reader(self._read, loop.calls)
            conversation.add_response(response, read)
            calls = read.response.calls
            over = len(conversation.turns) == limits.max_assistant_turns or answers == limits.max_user_turns
            if not calls or over or len(conversation.ids) >= full:
                return
            answers += 1
            loop.calls += len(calls)
            conversation.add_messages(*await self._results(loop, calls))
        loop.finish_reason = "length"

    async def _results(
        self, loop: _Loop, calls: Sequence[ToolCall | BadCall]
    ) -> tuple[list[dict[str, Any]], list[ImageInputs]]:
        """Run calls in parallel; return their results as messages with images, in the order of the calls."""
        began = time.monotonic()
        first = loop.calls - len(calls)
        results = await asyncio.gather(
            *(self._result(loop.request, number, call) for number, call in enumerate(calls, start=first))
        )
        loop.seconds += time.monotonic() - began
        readable = all(isinstance(call, ToolCall) for call in calls)
        messages: list[dict[str, Any]] = []
        images: list[ImageInputs] = []
        for call, result in zip(calls, results, strict=True):
            content, is_error, own = await self._read_result(result)
            loop.errors += is_error
            images += own
            message = {"role": "tool" if readable else self._error_role, "content": content}
            if message["role"] == "tool" and isinstance(call, ToolCall):
                message |= {"name": call.name, "tool_call_id": call.id}
            messages.append(message)
        return messages, images

    async def _read_result(self, result: Result) -> tuple[Any, bool, list[ImageInputs]]:
        """Return the content of a result for the model, whether it is an error, and its images."""
        content, images, is_error = result.content, [], result.is_error
        try:
            content, images = await self._images.read(
                content if self._images.are_read else text_of(content, "[image]")
            )
        except PromptError as error:
            content, is_error = f"Error: the result {error}", True
        limit, side = self._limits.max_tool_response_length, self._limits.tool_response_truncate_side
        if isinstance(content, str):
            return shortened(content, limit, side), is_error, []
        parts = [
            {**part, "text": shortened(part["text"], limit, side)} if part["type"] == "text" else part
            for part in content
        ]
        return parts, is_error, images

    async def _result(self, request: RolloutRequest, number: int, call: ToolCall | BadCall) -> Result:
        if isinstance(call, BadCall):
            return Result(f"Error: the call {call.reason}", is_error=True)
        if call.name not in self._names:
            known = ", ".join(self._names)
            return Result(f"Error: there is no function {call.name!r}; there are: {known}", is_error=True)
        seed = f"{turn_seed(request.seed, number)}/{request.id.member}/{call.name}"
        return await self._pool.call(call.name, call.arguments, seed)


class _Reader:
    """Reads one response, as `Conversation.add_response` asks for, and keeps its calls."""

    def __init__(self, read: ToolFormat, calls_before: int) -> None:
        self._read, self._calls_before = read, calls_before
        self.response = ReadResponse({})

    def __call__(self, text: str) -> Mapping[str, Any]:
        self.response = self._read(text, self._calls_before)
        return self.response.message


@dataclass
class _Loop:
    """A rollout so far."""

    request: RolloutRequest
    conversation: Conversation | None = None
    response_ids: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    finish_reason: FinishReason = "stop"
    calls: int = 0
    errors: int = 0
    seconds: float = 0.0
    outcome: Outcome | None = None

    def tokens(self, weights_version: int) -> RolloutTokens:
        conversation = self.conversation
        return RolloutTokens(
            self.request.id,
            self.request.prompt,
            conversation.sequences if conversation else (),
            self.response_ids,
            self.finish_reason,
            weights_version,
            self.outcome,
            tuple(conversation.messages) if conversation else (),
            conversation.turns if conversation else (),
            {"tool_calls": self.calls, "tool_errors": self.errors, "tool_seconds": self.seconds},
            conversation.seen if conversation else (),
        )


def shortened(text: str, limit: int, side: str) -> str:
    """Cut a text to `limit` characters, as verl does: keep its beginning (`left`), its end (`right`), or both."""
    if len(text) <= limit:
        return text
    if side == "left":
        return text[:limit] + "...(truncated)"
    if side == "right":
        return "(truncated)..." + text[len(text) - limit :]
    half = limit // 2
    return text[:half] + "...(truncated)..." + text[len(text) - half :]
