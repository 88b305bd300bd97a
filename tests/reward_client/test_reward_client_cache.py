"""Scores on disk."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from iiverl_reward_client import Failed, Outcome, Retries, RewardClient, RewardSample, Scored
from reward_client.faulty_server import FaultyServer, Request, answer

SAMPLE = RewardSample("1", "output", {"type": "t", "answer": {"value": 1}})


class VersionedServer(FaultyServer):
    """Offers `/v1/rewards`, tells its version, and gives each sample another score than the last."""

    def __init__(self, version: str) -> None:
        super().__init__(handlers={"/v1/capabilities": self.tell, "/v1/rewards": self.score})
        self.version = version
        self.scored = 0

    async def tell(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        return await answer(writer, {"protocol": "iiverl-rewards/1", "server_version": self.version})

    async def score(self, request: Request, writer: asyncio.StreamWriter) -> bool:
        results = []
        for sample in request.json["samples"]:
            self.scored += 1
            result = {"score": self.scored, "components": {"c": 0.5}, "info": {"why": "½"}}
            if sample["llm_output"] == "bad":
                result = {"error": {"kind": "bad_request", "detail": ""}}
            results.append({"id": sample["id"], **result})
        return await answer(writer, {"server_version": self.version, "results": results})


def score(server: FaultyServer, folder: Path, *samples: RewardSample, **options: Any) -> list[Outcome]:
    async def run() -> list[Outcome]:
        async with server, RewardClient(server.url, cache_dir=folder, **options) as client:
            return [await client.score(sample) for sample in samples]

    return asyncio.run(run())


def test_what_the_same_version_scored_is_not_asked_again(tmp_path: Path) -> None:
    first = [Scored(1.0, {"c": 0.5}, {"why": "½"})]
    assert score(VersionedServer("1"), tmp_path, SAMPLE) == first
    again = VersionedServer("1")
    # The id is the caller's, and no part of what is scored.
    assert score(again, tmp_path, replace(SAMPLE, id="other")) == first
    assert again.scored == 0 and again.paths() == ["/v1/capabilities"]
    newer = VersionedServer("2")
    score(newer, tmp_path, SAMPLE)
    assert newer.scored == 1


@pytest.mark.parametrize(
    "change",
    [
        {"llm_output": "other"},
        {"prompt": "p"},
        {"response": "r"},
        {"label": 1},
        {"verification_info": {"type": "t"}},
        {"verification_info": '{"type": "t", "answer": {"value": 1}}'},
    ],
)
def test_other_content_is_another_entry(tmp_path: Path, change: dict) -> None:
    score(VersionedServer("1"), tmp_path, SAMPLE)
    server = VersionedServer("1")
    score(server, tmp_path, replace(SAMPLE, **change))
    assert server.scored == 1


def test_failures_are_not_kept(tmp_path: Path) -> None:
    bad = replace(SAMPLE, llm_output="bad")
    for _ in range(2):
        server = VersionedServer("1")
        (outcome,) = score(server, tmp_path, bad)
        assert isinstance(outcome, Failed) and server.scored == 1
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"score": NaN}', '{"score": null}'])
def test_a_spoilt_file_counts_as_absent_and_is_written_anew(tmp_path: Path, content: str) -> None:
    score(VersionedServer("1"), tmp_path, SAMPLE)
    (file,) = tmp_path.rglob("*.json")
    file.write_text(content)
    server = VersionedServer("1")
    score(server, tmp_path, SAMPLE)
    assert server.scored == 1
    again = VersionedServer("1")
    score(again, tmp_path, SAMPLE)
    assert again.scored == 0


def test_a_server_without_a_version_needs_one_given(tmp_path: Path) -> None:
    for options, requests in (
        ({}, [1, 1]),
        ({"server_version": "7"}, [1, 0]),
        ({"server_version": "8"}, [1, 0]),
    ):
        for wanted in requests:
            server = FaultyServer()
            assert isinstance(score(server, tmp_path, SAMPLE, protocol="reward", **options)[0], Scored)
            assert len(server.requests) == wanted, options


def test_a_file_in_place_of_the_folder_costs_no_score(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    folder.write_text("")
    outcomes = score(VersionedServer("1"), folder, SAMPLE, replace(SAMPLE, llm_output="x"))
    assert all(isinstance(outcome, Scored) for outcome in outcomes)
    assert caplog.text.count("cannot be cached") == 1


def test_a_score_that_took_a_retry_is_kept(tmp_path: Path) -> None:
    server = FaultyServer({"output": ["500"]})
    options = {"protocol": "reward", "server_version": "1", "retries": Retries(first_delay=0.001)}
    (scored,) = score(server, tmp_path, SAMPLE, **options)
    assert isinstance(scored, Scored)
    assert score(FaultyServer({"output": ["500"]}), tmp_path, SAMPLE, **options) == [scored]
