"""Score on a reward server while other responses are still being generated."""

import json
import logging
import os
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from iiverl_core import activity
from iiverl_core.columns import verification_info_of, without_nulls
from iiverl_core.config import RewardAPIConfig, RunConfig
from iiverl_core.errors import ConfigError, IIVerlError
from iiverl_core.rewards.failures import describe_failures
from iiverl_core.rewards.scorer import Span, covered
from iiverl_core.samples import Prompt, Rollout, SampleId
from iiverl_reward_client import (
    Capabilities,
    Failed,
    Outcome,
    RewardClient,
    RewardSample,
    Scored,
    SyncRewardClient,
    Timeouts,
)

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between pings of a server that does not answer
ROWS_CHECKED = 100


@dataclass
class _Sent:
    """A submitted sample: when it was sent, and how long it took once that is known."""

    sample: RewardSample
    future: Future[Outcome]
    at: float
    seconds: float | None = None

    def done(self, _: Future[Outcome]) -> None:
        self.seconds = time.monotonic() - self.at
        activity.advance()


class RemoteScorer:
    """A `Scorer` that sends rollouts to a reward server.

    The client retries short outages. If more than `max_failed_fraction` of the samples still have no score because of
    an outage, `collect` waits for the server up to `outage_patience` seconds and sends those samples again.
    """

    def __init__(self, config: RewardAPIConfig, client: SyncRewardClient) -> None:
        self._config, self._client = config, client
        self._submitted: dict[SampleId, _Sent] = {}
        self.busy_spans: list[Span] = []

    @property
    def busy_seconds(self) -> float:
        """See `Scorer.busy_seconds`."""
        return covered(self.busy_spans)

    def submit(self, rollout: Rollout) -> None:
        """Send a rollout and return at once; see `Scorer.submit`."""
        if rollout.id in self._submitted:
            raise ValueError(f"{rollout.id} was submitted twice")
        self._send(rollout.id, reward_sample(rollout, self._config.verification_info_column))

    def collect(self, ids: Collection[SampleId], may_fail: float | None = None) -> Mapping[SampleId, Outcome]:
        """Wait for outcomes; see `Scorer.collect`."""
        outcomes = self._wait(ids)
        deadline = time.monotonic() + self._config.outage_patience
        pause = FIRST_PAUSE
        while unscored := self._unscored(outcomes, may_fail):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failed)]
            logger.warning(
                "%s\nWaiting for the reward server for up to %.0f s; the samples are kept.",
                describe_failures(failed, len(outcomes)),
                left,
            )
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
            activity.advance()  # a wait with an end of its own
            if any(not isinstance(answer, Failed) for answer in self._client.ping().values()):
                for id in unscored:
                    self._send(id, self._submitted[id].sample)
                outcomes |= self._wait(unscored)
        collected = [self._submitted.pop(id) for id in outcomes]
        self.busy_spans = [(sent.at, sent.at + (sent.seconds or 0.0)) for sent in collected]
        return outcomes

    def is_scored(self, ids: Collection[SampleId]) -> bool:
        """See `Scorer.is_scored`; what an outage left without a score may be sent again."""
        futures = [self._submitted[id].future for id in ids]
        return all(each.done() and not _outage(each.result()) for each in futures)

    def close(self) -> None:
        """See `Scorer.close`."""
        self._submitted.clear()
        self._client.close()

    def _send(self, id: SampleId, sample: RewardSample) -> None:
        sent = _Sent(sample, self._client.submit(sample), time.monotonic())
        sent.future.add_done_callback(sent.done)
        self._submitted[id] = sent

    def _wait(self, ids: Collection[SampleId]) -> dict[SampleId, Outcome]:
        """Wait for the outcomes of these samples; `seconds` in a score's info is the time it took."""
        outcomes: dict[SampleId, Outcome] = {}
        for id in ids:
            sent = self._submitted[id]
            outcome = sent.future.result()
            if isinstance(outcome, Scored):
                seconds = sent.seconds if sent.seconds is not None else time.monotonic() - sent.at
                outcome = replace(outcome, info={**outcome.info, "seconds": seconds})
            outcomes[id] = outcome
        return outcomes

    def _unscored(self, outcomes: Mapping[SampleId, Outcome], may_fail: float | None) -> list[SampleId]:
        """Return the samples to send again: those an outage left unscored, if they are too many."""
        ids = [id for id, each in outcomes.items() if _outage(each)]
        limit = self._config.max_failed_fraction * len(outcomes) if may_fail is None else may_fail
        return ids if len(ids) > limit else []


def _outage(outcome: Outcome) -> bool:
    return isinstance(outcome, Failed) and outcome.outage


def reward_sample(rollout: Rollout, column: str) -> RewardSample:
    """Convert a rollout to the sample that reward servers are sent."""
    return RewardSample(
        id="-".join(map(str, rollout.id)),
        llm_output=rollout.prompt.text + rollout.raw_text,
        verification_info=verification_info_of(rollout.prompt.columns, column),
        prompt=rollout.prompt.text,
        response=rollout.raw_text,
        label=rollout.prompt.ground_truth,
    )


def make_client(config: RewardAPIConfig) -> SyncRewardClient:
    """Connect to the configured servers.

    Raises:
        ConfigError: an address or the token is invalid.
    """
    try:
        client = RewardClient(
            config.api_url or (),
            token=os.environ.get(config.token_env) if config.token_env else None,
            protocol=config.protocol,
            max_workers=config.max_workers,
            timeouts=Timeouts(
                connect=min(5.0, config.timeout), read=config.timeout, sample=max(30.0, 2 * config.timeout)
            ),
            cache_dir=config.cache_dir,
        )
    except ValueError as error:
        raise ConfigError(f"reward_api: {error}") from error
    return SyncRewardClient(client)


def check_server(client: SyncRewardClient) -> dict[str, Capabilities | None]:
    """Check that the servers answer, and return their capabilities; None for a server that does not report them.

    Raises:
        IIVerlError: no server answers.
        ConfigError: a server refuses the token.
    """
    answers = client.ping()
    away = {url: answer for url, answer in answers.items() if isinstance(answer, Failed)}
    for url, failure in away.items():
        message = f"the reward server {url} does not answer ({failure.kind}: {failure.detail})"
        if len(away) == len(answers):
            raise IIVerlError(f"{message}. Start it, or fix reward_api.api_url.")
        logger.warning("%s; the others are used", message)
    capabilities = client.capabilities()
    for url, answer in capabilities.items():
        if isinstance(answer, Failed) and answer.kind == "bad_request":
            raise ConfigError(f"the reward server {url} refuses: {answer.detail}. See reward_api.token_env.")
    return {url: None if isinstance(answer, Failed) else answer for url, answer in capabilities.items()}


def too_slow(servers: Mapping[str, Capabilities | None], timeout: float) -> list[str]:
    """Describe each server that may take longer for one sample than `reward_api.timeout`."""
    return [
        f"the reward server {url} may take {server.max_seconds:g} s for one sample, and reward_api.timeout gives up "
        f"after {timeout:g} s: raise it, or lower the server's time limits"
        for url, server in servers.items()
        if server is not None and server.max_seconds is not None and server.max_seconds > timeout
    ]


def check_rows(run: RunConfig, prompts: Iterable[Prompt], servers: Mapping[str, Capabilities | None]) -> None:
    """Check that the servers can verify the first rows.

    Raises:
        ConfigError: a row has no `verification_info_column`, no JSON object in it, or a type that a server does not
            verify.
    """
    column = run.rewards.api.verification_info_column
    if run.rewards.api.protocol in ("openrlhf", "slime"):
        return
    for prompt in islice(prompts, ROWS_CHECKED):
        place = f"{prompt.place}, column {column!r} (reward_api.verification_info_column)"
        if column not in prompt.columns:
            there = ", ".join(prompt.columns) or "none but the prompt"
            raise ConfigError(f"{place}: there is no such column. Columns: {there}.")
        kind = _verification_type(without_nulls(prompt.columns[column]), place)
        for url, server in servers.items():
            if server is not None and kind not in server.types:
                reason = server.unavailable.get(kind, f"it verifies {', '.join(server.types)}")
                raise ConfigError(
                    f"{place}: the reward server {url} cannot verify the type {kind!r}: {reason}"
                )


def _verification_type(info: Any, place: str) -> str:
    if isinstance(info, str):
        try:
            info = json.loads(info)
        except ValueError as error:
            raise ConfigError(f"{place}: {info[:60]!r} is not JSON: {error}") from None
    if not isinstance(info, Mapping):
        raise ConfigError(f"{place}: a JSON object with 'type' and 'answer' is needed, not {info!r}")
    missing = [name for name in ("type", "answer") if info.get(name) is None]
    if missing:
        raise ConfigError(
            f"{place}: {' and '.join(missing)} missing; there is {', '.join(map(str, info)) or 'nothing'}"
        )
    return str(info["type"])
