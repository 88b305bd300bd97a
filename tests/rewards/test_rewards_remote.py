"""Scoring on a reward server: what is sent, what failures come to, outages, and the checks before a run."""

import json
import threading
import time

import pytest

from iiverl_core.config import RewardAPIConfig, build, run_config
from iiverl_core.errors import ConfigError, IIVerlError
from iiverl_core.rewards import apply_failure_policy, check_failures, make_scorer
from iiverl_core.rewards.failures import TooManyFailures
from iiverl_core.rewards.remote import check_rows, check_server, make_client, reward_sample
from iiverl_core.samples import Prompt
from iiverl_reward_client import Failed, Scored
from reward_servers import reward_server
from rollouts import id_of, make_rollout

INFO = json.dumps({"type": "math_verifiable", "answer": {"value": "7"}})


def config(url: str, **more):
    return run_config(build({"reward_api": {"enable": True, "api_url": url, "timeout": 2, **more}}))


def by_length(body: dict) -> tuple[int, dict]:
    return 200, {"score": len(body["llm_output"]) / 100}


def check_prompts(configuration, prompts) -> None:
    """What is seen before a run."""
    with make_client(configuration.rewards.api) as client:
        check_rows(configuration, prompts, check_server(client))


def prompt(**columns) -> Prompt:
    return Prompt(row=0, ids=(1,), text="q", columns=columns, source="rows.jsonl", source_row=3)


@pytest.fixture
def scoring(make_sample):
    """Score some texts with a configuration; outcomes by number."""

    def score(configuration, *texts: str) -> list:
        scorer = make_scorer(configuration)
        try:
            for i, text in enumerate(texts):
                scorer.submit(make_sample(text, key=(i, 0), verification_info=INFO))
            outcomes = scorer.collect([id_of(i, 0) for i in range(len(texts))])
        finally:
            scorer.close()
        return [outcomes[id_of(i, 0)] for i in range(len(texts))]

    return score


def test_what_is_sent_and_what_comes_back(scoring) -> None:
    with reward_server(by_length) as server:
        outcomes = scoring(config(server.url), "a", "bbb")
    assert [outcome.score for outcome in outcomes] == [0.14, 0.16]
    assert sorted(server.requests, key=lambda body: len(body["llm_output"]))[0] == {
        "llm_output": "questiona<end>",
        "verification_info": INFO,
    }
    assert all(0 < outcome.info["seconds"] < 10 for outcome in outcomes)


def test_a_refused_sample_is_a_failure_and_the_others_keep_their_scores(scoring) -> None:
    def refuse_b(body: dict):
        return (422, {"detail": "no such type"}) if "b" in body["llm_output"] else (200, {"score": 1.0})

    with reward_server(refuse_b) as server:
        good, bad = scoring(config(server.url), "a", "b")
    assert good.score == 1.0
    assert isinstance(bad, Failed) and bad.kind == "bad_request" and "no such type" in bad.detail


def test_samples_are_scored_while_others_are_still_to_come(make_sample) -> None:
    arrived = threading.Event()

    def note(body: dict):
        arrived.set()
        return 200, {"score": 1.0}

    with reward_server(note) as server:
        scorer = make_scorer(config(server.url))
        scorer.submit(make_sample("a", key=(0, 0), verification_info=INFO))
        assert arrived.wait(5)  # before collect is called
        scorer.submit(make_sample("b", key=(0, 1), verification_info=INFO))
        assert list(scorer.collect([id_of(0, 1)])) == [id_of(0, 1)]
        assert list(scorer.collect([id_of(0, 0)])) == [id_of(0, 0)]
        scorer.close()


def test_a_server_that_comes_back_scores_everything(scoring) -> None:
    with reward_server(by_length) as server:
        server.stop()
        threading.Timer(1.5, server.start).start()
        outcomes = scoring(config(server.url), *"abcd")
    assert all(isinstance(outcome, Scored) for outcome in outcomes)


def test_waiting_out_an_outage_sends_the_missing_samples_again(scoring, monkeypatch, caplog) -> None:
    """The client gives up, the scorer does not."""
    from iiverl_core.rewards import remote

    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.05)
    failing = {"left": 6}

    def broken_at_first(body: dict):
        if failing["left"] > 0:
            failing["left"] -= 1
            return 500, {"detail": "starting"}
        return by_length(body)

    monkeypatch.setattr(remote, "Timeouts", lambda **_: remote_timeouts)
    from iiverl_reward_client import Timeouts

    remote_timeouts = Timeouts(connect=1, read=1, sample=0.3)
    with reward_server(broken_at_first) as server:
        outcomes = scoring(config(server.url, max_workers=2), "a", "b")
    assert [outcome.score for outcome in outcomes] == [0.14, 0.14]


def test_a_server_that_stays_away_is_diagnosed(scoring, monkeypatch) -> None:
    from iiverl_core.rewards import remote
    from iiverl_reward_client import Timeouts

    monkeypatch.setattr(remote, "Timeouts", lambda **_: Timeouts(connect=0.2, read=0.2, sample=0.3))
    with reward_server(by_length) as server:
        server.stop()
        url = server.url
        started = time.monotonic()
        outcomes = scoring(config(url, outage_patience=1), *"abc")
        assert time.monotonic() - started < 20
    with pytest.raises(TooManyFailures) as caught:
        check_failures(dict(enumerate(outcomes)), 0.1)
    message = str(caught.value)
    assert "3 of 3 samples could not be scored" in message and "transport" in message
    assert url in message


def test_a_few_failures_are_not_waited_for(scoring) -> None:
    def one_fails(body: dict):
        return (422, {"detail": "odd"}) if "b" in body["llm_output"] else (200, {"score": 1.0})

    with reward_server(one_fails) as server:
        started = time.monotonic()
        scoring(config(server.url, max_failed_fraction=0.0), "a", "b")  # a refusal does not pass by waiting
        assert time.monotonic() - started < 5


def test_on_failure() -> None:
    outcomes = {id_of(0, 0): Scored(1.0), (0, 1): Failed("server", detail="boom")}
    assert apply_failure_policy(outcomes, RewardAPIConfig()) == outcomes
    replaced = apply_failure_policy(outcomes, RewardAPIConfig(on_failure="constant", failure_score=-1.0))[
        0, 1
    ]
    assert isinstance(replaced, Scored) and replaced.score == -1.0
    assert replaced.info == {"failed": "server", "detail": "boom"}
    with pytest.raises(IIVerlError, match=r"1 of 2 samples .* server 1\.\n  server: boom"):
        apply_failure_policy(outcomes, RewardAPIConfig(on_failure="fail"))
    assert apply_failure_policy({id_of(0, 0): Scored(1.0)}, RewardAPIConfig(on_failure="fail")) == {
        id_of(0, 0): Scored(1.0)
    }


def test_the_token_is_sent_and_shown_nowhere(scoring, monkeypatch, caplog) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "sesame-1234")
    with reward_server(lambda body: (500, {"detail": "sesame-1234"})) as server:
        from iiverl_core.rewards import remote
        from iiverl_reward_client import Timeouts

        monkeypatch.setattr(remote, "Timeouts", lambda **_: Timeouts(connect=1, read=1, sample=0.3))
        (outcome,) = scoring(config(server.url, token_env="REWARD_TOKEN", outage_patience=0), "a")
    assert server.headers[0]["Authorization"] == "Bearer sesame-1234"
    assert "sesame" not in repr(outcome) + caplog.text


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"verification": INFO}, r"rows.jsonl, row 3 .*'verification_info' .*no such column.*verification"),
        ({"verification_info": "{'type'}"}, r"row 3 .*is not JSON"),
        ({"verification_info": "[1]"}, "a JSON object"),
        ({"verification_info": '{"answer": {}}'}, "type missing; there is answer"),
        ({"verification_info": None}, "a JSON object"),
    ],
)
def test_rows_are_checked_before_the_run(columns: dict, message: str) -> None:
    with reward_server(by_length) as server, pytest.raises(ConfigError, match=message):
        check_prompts(config(server.url), [prompt(**columns)])


def test_good_rows_pass_as_text_or_as_a_mapping() -> None:
    with reward_server(by_length) as server:
        check_prompts(
            config(server.url), [prompt(verification_info=INFO), prompt(verification_info=json.loads(INFO))]
        )


def test_nulls_are_no_fields_of_the_verification_info() -> None:
    """A parquet file gives every row the fields of all rows; a server refuses an answer whose language is null."""
    info = {"type": "code_verifiable", "answer": {"test_cases": [{"input": "1", "output": "2"}]}}
    cases = [{"input": "1", "output": "2", "timeout": None}]
    filled = {**info, "answer": {"test_cases": cases, "language": None, "value": None}, "extra": None}
    row = prompt(verification_info=filled)
    assert reward_sample(make_rollout(prompt=row), "verification_info").verification_info == info
    assert reward_sample(make_rollout(prompt=prompt()), "verification_info").verification_info == ""


def test_a_server_that_does_not_answer_is_told_before_the_run() -> None:
    with reward_server(by_length) as server:
        server.stop()
        with pytest.raises(IIVerlError, match=rf"{server.url} does not answer \(transport"):
            check_prompts(config(server.url), [prompt(verification_info=INFO)])


def test_a_server_that_may_take_longer_than_the_run_waits_is_named() -> None:
    from iiverl_core.rewards.remote import too_slow
    from iiverl_reward_client import Capabilities

    def server(seconds: float | None) -> Capabilities:
        return Capabilities("iiverl-rewards/1", "1", max_seconds=seconds)

    servers = {"slow": server(60.0), "quick": server(30.0), "silent": server(None), "other": None}
    (told,) = too_slow(servers, timeout=30.0)
    assert "slow" in told and "60 s" in told and "30 s" in told
