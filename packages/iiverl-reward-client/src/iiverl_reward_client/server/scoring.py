"""Score the samples of requests with the verifiers of their types."""

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from iiverl_reward_client.outcomes import Scored
from iiverl_reward_client.server.lanes import Lane
from iiverl_reward_client.server.metrics import Metrics
from iiverl_reward_client.server.registry import BUILT_IN, find_verifiers, version_of
from iiverl_reward_client.server.settings import Settings
from iiverl_reward_client.verifiers import (
    BadAnswerError,
    ResponseError,
    Submission,
    UnavailableError,
    VerifierError,
)
from iiverl_reward_client.verifiers.extraction import split_turn
from iiverl_reward_client.verifiers.format_score import format_score, with_format

_log = logging.getLogger(__name__)

Result = Scored | VerifierError


class Scoring:
    """The verifiers of a server, each with its lane. `files` are user verifiers as `file.py:function`.

    Raises:
        SettingsError: a user verifier does not exist, or has the type of another.
    """

    def __init__(self, settings: Settings, files: Sequence[str] = ()) -> None:
        self.settings = settings
        self.version = version_of(settings, files)
        self.unavailable: dict[str, str] = {}
        self.metrics = Metrics()
        self._verifiers = find_verifiers(settings, files)
        self._lanes = {
            type: Lane(registered.places, settings.queue) for type, registered in self._verifiers.items()
        }
        for type, lane in self._lanes.items():
            self.metrics.watch(type, lambda lane=lane: lane.in_flight, lambda lane=lane: lane.waiting)

    @property
    def types(self) -> list[str]:
        """The types that this server can verify."""
        return [type for type in self._verifiers if type not in self.unavailable]

    @property
    def max_seconds(self) -> float:
        """The longest that verifying one sample may take, once it has a place."""
        limits = {
            "code_verifiable": self.settings.code_time_limit,
            "llm_judge": self.settings.judge_time_limit,
        }
        return max(limits.get(type, self.settings.time_limit) for type in self.types)

    @property
    def in_flight(self) -> int:
        """Number of samples being verified."""
        return sum(lane.in_flight for lane in self._lanes.values())

    @property
    def waiting(self) -> int:
        """Number of samples waiting for a place."""
        return sum(lane.waiting for lane in self._lanes.values())

    async def start(self) -> None:
        """Start all verifiers; those that fail are `unavailable`, with the reason."""
        await asyncio.gather(*(self._start(type) for type in self._verifiers))

    async def close(self) -> None:
        """Cancel samples in flight, and free processes and connections."""
        await asyncio.gather(*(lane.close() for lane in self._lanes.values()))
        await asyncio.gather(*(registered.verifier.close() for registered in self._verifiers.values()))

    async def score(
        self, llm_output: str, prompt: str | None, response: str | None, info: str | Mapping[str, Any]
    ) -> Result:
        """Score one sample; any failure is part of the result.

        If `response` is None, the text after the last answer marker of `llm_output` is verified.
        """
        arrived = time.monotonic()
        type = "unknown"
        try:
            document = _read(info)
            type = self._known(document["type"])
            if response is None:
                before, response = split_turn(llm_output, self.settings.answer_marker)
                prompt = before if prompt is None else prompt
            submission = Submission(type, response, document["answer"], prompt, document)
            result: Result = await self._verified(submission)
        except VerifierError as failed:
            result = failed
        except Exception as error:
            _log.exception("verifying a sample of type %s", type)
            result = VerifierError("server", f"{type}: {error.__class__.__name__} in the server")
        self.metrics.count(type, result, time.monotonic() - arrived)
        return result

    async def _start(self, type: str) -> None:
        try:
            await self._verifiers[type].verifier.start()
        except UnavailableError as error:
            self.unavailable[type] = error.detail

    def _known(self, type: Any) -> str:
        if not isinstance(type, str) or type not in self._verifiers:
            shown = repr(type)[:80]
            raise BadAnswerError(
                f"verification_info has the unknown type {shown}; known: {', '.join(self._verifiers)}"
            )
        return type

    async def _verified(self, submission: Submission) -> Scored:
        type, settings = submission.type, self.settings
        if type in self.unavailable:
            raise UnavailableError(self.unavailable[type])
        verifier = self._verifiers[type].verifier
        verifier.check(submission.answer)
        try:
            scored = await self._lanes[type].run(lambda: verifier.verify(submission))
        except ResponseError as error:
            scored = Scored(0.0, info={"reason": error.reason})
        if settings.use_format_verifier and type in BUILT_IN:
            return with_format(scored, format_score(submission, settings.end_token))
        return scored


def _read(info: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Parse a `verification_info` and check the fields that all types have.

    Raises:
        BadAnswerError: it is not a JSON object, or has no `type` or `answer`.
    """
    if isinstance(info, str):
        try:
            info = json.loads(info)
        except (ValueError, RecursionError) as error:
            raise BadAnswerError(f"verification_info is not JSON: {str(error)[:200]}") from None
    if not isinstance(info, Mapping):
        raise BadAnswerError(f"verification_info must be a JSON object, not {type(info).__name__}")
    for name in ("type", "answer"):
        if name not in info:
            raise BadAnswerError(f"verification_info has no {name!r}")
    return info
