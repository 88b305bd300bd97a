"""A step's rollouts are scored in parts as they would be together."""

import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
from test_controller_state import RUN, Scores, Silent

from iiverl_core.controller.scoring import Scoring
from iiverl_core.rewards import TooManyFailures
from iiverl_core.rewards.remote import RemoteScorer
from iiverl_core.samples import Prompt
from iiverl_reward_client import Failed, Outcome, Scored
from rollouts import make_rollout

TOTAL = 32
AWAY = Failed("transport", detail="the server is away", outage=True)


class Client:
    """A reward server that answers with the outcome of a sample's number."""

    def __init__(self, outcomes: dict[int, Outcome]) -> None:
        self._outcomes = outcomes
        self.sent = 0

    def submit(self, sample: Any) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        future.set_result(self._outcomes.get(int(sample.response), Scored(1.0)))
        self.sent += 1
        return future

    def ping(self) -> dict[str, Outcome]:
        return {"server": Scored(0.0)}

    def close(self) -> None: ...


def score(parts: int, outcomes: dict[int, Outcome], **api: float) -> Client:
    """Score `TOTAL` rollouts in parts of the same size."""
    config = RUN.rewards.api.model_copy(update={"outage_patience": 0.5, "max_failed_fraction": 0.1, **api})
    run = replace(RUN, rewards=replace(RUN.rewards, api=config))
    client: Any = Client(outcomes)
    observer: Any = Silent()
    scorer = RemoteScorer(config, client)
    scoring = Scoring(run, scorer, observer, 1, TOTAL)
    column = {config.verification_info_column: "{}"}
    rollouts = [
        make_rollout(i, raw_text=str(i), prompt=Prompt(row=i, ids=(1,), text="p", columns=column))
        for i in range(TOTAL)
    ]
    for rollout in rollouts:
        scorer.submit(rollout)
    size = TOTAL // parts
    for first in range(0, TOTAL, size):
        scoring.score(rollouts[first : first + size])
    return client


@pytest.mark.parametrize("parts", [1, 8])
def test_scores_of_parts_that_come_together_count_once(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds of scoring, of which four are waited for, all of them with the first part."""
    clock = iter([0.0, 4.0] + [4.0] * 2 * parts)
    monkeypatch.setattr("iiverl_core.controller.scoring.time.perf_counter", lambda: next(clock))

    class TogetherScores(Scores):
        busy_spans = ((-6.0, 4.0),)

    scorer: Any = TogetherScores()
    observer: Any = Silent()
    scoring = Scoring(RUN, scorer, observer, 1, TOTAL)
    for part in range(parts):
        scoring.score([make_rollout(part)])
    assert scoring.hidden_fraction == 0.6


@pytest.mark.parametrize("parts", [1, 8, 32])
def test_a_failure_that_the_step_can_bear_is_not_waited_for(parts: int) -> None:
    """One of four is more than the limit of 10 %, one of 32 is not."""
    began = time.monotonic()
    client = score(parts, {5: AWAY, 30: AWAY, 31: AWAY}, outage_patience=60)
    assert time.monotonic() - began < 10
    assert client.sent == TOTAL


@pytest.mark.parametrize("parts", [1, 8, 32])
def test_more_failures_than_the_step_can_bear_are_sent_again_and_end_it(parts: int) -> None:
    with pytest.raises(TooManyFailures, match=r"of 32 samples could not be scored"):
        score(parts, dict.fromkeys(range(4), AWAY), outage_patience=0.1)
    with pytest.raises(TooManyFailures):
        score(parts, dict.fromkeys(range(TOTAL), Failed("function", detail="no")), max_failed_fraction=1.0)
