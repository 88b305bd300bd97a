"""Scoring on a reward server, while others are still being generated."""

import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from iiverl_core.config import RewardAPIConfig, RunConfig
from iiverl_core.errors import ConfigError, IIVerlError
from iiverl_core.rewards.failures import describe_failures
from iiverl_core.rewards.scorer import Key, Span, covered
from iiverl_core.samples import Prompt, Sample
from iiverl_reward_client import (
    Capabilities,
    Failed,
    FailureKind,
    Outcome,
    RewardClient,
    RewardSample,
    Scored,
    SyncRewardClient,
    Timeouts,
)

logger = logging.getLogger(__name__)

OUTAGE: set[FailureKind] = {"transport", "timeout", "overload", "server"}  # what may pass if one waits
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds between two looks at a server that is away
ROWS_CHECKED = 100


@dataclass
class _Sent:
    """A sample on its way: when it was sent, and how long it took once that is known."""

    sample: RewardSample
    future: Future[Outcome]
    at: float
    seconds: float | None = None

    def done(self, _: Future[Outcome]) -> None:
        self.seconds = time.monotonic() - self.at


class RemoteScorer:
    """A `Scorer` that asks a reward server.

    A server that is away for a moment is the client's business: it retries. Where more than `max_failed_fraction` of
    what was submitted still comes back without a score for reasons that may pass, `collect` waits for the server up to
    `outage_patience` seconds and sends those samples again.
    """

    def __init__(self, config: RewardAPIConfig, client: SyncRewardClient) -> None:
        self._config, self._client = config, client
        self._submitted: dict[Key, _Sent] = {}
        self.busy_spans: list[Span] = []

    @property
    def busy_seconds(self) -> float:
        """See `Scorer.busy_seconds`."""
        return covered(self.busy_spans)

    def submit(self, sample: Sample) -> None:
        """Send a sample and return at once; see `Scorer.submit`."""
        key = (sample.group, sample.member)
        if key in self._submitted:
            raise ValueError(f"sample {key} was submitted twice")
        self._send(key, reward_sample(sample, self._config.verification_info_column))

    def collect(self) -> Mapping[Key, Outcome]:
        """Wait for all outcomes; see `Scorer.collect`."""
        outcomes = self._wait()
        deadline = time.monotonic() + self._config.outage_patience
        pause = FIRST_PAUSE
        while away := self._missing(outcomes):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            failed = [outcome for outcome in outcomes.values() if isinstance(outcome, Failed)]
            logger.warning(
                "%s\nWaiting for the reward server, %.0f s more at the most; the samples are kept.",
                describe_failures(failed, len(outcomes)),
                left,
            )
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
            if any(not isinstance(answer, Failed) for answer in self._client.ping().values()):
                for key in away:
                    self._send(key, self._submitted[key].sample)
                outcomes |= self._wait(away)
        self.busy_spans = [(sent.at, sent.at + (sent.seconds or 0.0)) for sent in self._submitted.values()]
        self._submitted.clear()
        return outcomes

    def close(self) -> None:
        """See `Scorer.close`."""
        self._submitted.clear()
        self._client.close()

    def _send(self, key: Key, sample: RewardSample) -> None:
        sent = _Sent(sample, self._client.submit(sample), time.monotonic())
        sent.future.add_done_callback(sent.done)
        self._submitted[key] = sent

    def _wait(self, keys: Iterable[Key] | None = None) -> dict[Key, Outcome]:
        """Wait for the outcomes of these samples, or of all; a score tells in how many seconds it came."""
        outcomes: dict[Key, Outcome] = {}
        for key in list(keys or self._submitted):
            sent = self._submitted[key]
            outcome = sent.future.result()
            if isinstance(outcome, Scored):
                seconds = sent.seconds if sent.seconds is not None else time.monotonic() - sent.at
                outcome = replace(outcome, info={**outcome.info, "seconds": seconds})
            outcomes[key] = outcome
        return outcomes

    def _missing(self, outcomes: Mapping[Key, Outcome]) -> list[Key]:
        """Samples worth sending again, where there are so many that the step would not count."""
        away = [
            k for k, outcome in outcomes.items() if isinstance(outcome, Failed) and outcome.kind in OUTAGE
        ]
        return away if len(away) > self._config.max_failed_fraction * len(outcomes) else []


def reward_sample(sample: Sample, column: str) -> RewardSample:
    """Write a sample as reward servers take it."""
    return RewardSample(
        id=f"{sample.group}-{sample.member}",
        llm_output=sample.prompt.text + sample.raw_text,
        verification_info=sample.prompt.columns.get(column) or "",
        prompt=sample.prompt.text,
        response=sample.raw_text,
        label=sample.prompt.ground_truth,
    )


def make_client(config: RewardAPIConfig) -> SyncRewardClient:
    """Connect to the servers that the configuration names.

    Raises:
        ConfigError: an address or the token makes no sense.
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
    """See that every server answers, and ask what it can verify; None where it does not say.

    Raises:
        IIVerlError: none of them answers.
        ConfigError: one of them refuses, for want of the right token.
    """
    answers = client.ping()
    away = {url: answer for url, answer in answers.items() if isinstance(answer, Failed)}
    for url, failure in away.items():
        message = f"the reward server {url} does not answer ({failure.kind}: {failure.detail})"
        if len(away) == len(answers):
            raise IIVerlError(f"{message}. Start it, or mend reward_api.api_url.")
        logger.warning("%s; the others are used", message)
    told = client.capabilities()
    for url, answer in told.items():
        if isinstance(answer, Failed) and answer.kind == "bad_request":
            raise ConfigError(f"the reward server {url} refuses: {answer.detail}. See reward_api.token_env.")
    return {url: None if isinstance(answer, Failed) else answer for url, answer in told.items()}


def check_rows(run: RunConfig, prompts: Iterable[Prompt], servers: Mapping[str, Capabilities | None]) -> None:
    """See that the first rows hold what the servers verify.

    Raises:
        ConfigError: a row has no `verification_info_column`, no JSON object in it, or a type that a server lacks.
    """
    column = run.rewards.api.verification_info_column
    if run.rewards.api.protocol in ("openrlhf", "slime"):
        return
    for prompt in islice(prompts, ROWS_CHECKED):
        place = f"row {prompt.row} of the dataset, column {column!r} (reward_api.verification_info_column)"
        if column not in prompt.columns:
            there = ", ".join(prompt.columns) or "none but the prompt"
            raise ConfigError(f"{place}: there is no such column. Columns: {there}.")
        kind = _verification_type(prompt.columns[column], place)
        for url, server in servers.items():
            if server is not None and kind not in server.types:
                reason = server.unavailable.get(kind, f"it verifies {', '.join(server.types)}")
                raise ConfigError(
                    f"{place}: the reward server {url} cannot verify the type {kind!r}: {reason}"
                )


def _verification_type(info: Any, place: str) -> str:
    """Read the `type` of a row's verification info."""
    if isinstance(info, str):
        try:
            info = json.loads(info)
        except ValueError as error:
            raise ConfigError(f"{place}: {info[:60]!r} is no JSON: {error}") from None
    if not isinstance(info, Mapping):
        raise ConfigError(f"{place}: a JSON object with 'type' and 'answer' is needed, not {info!r}")
    missing = [name for name in ("type", "answer") if info.get(name) is None]
    if missing:
        raise ConfigError(
            f"{place}: {' and '.join(missing)} missing; there is {', '.join(map(str, info)) or 'nothing'}"
        )
    return str(info["type"])
