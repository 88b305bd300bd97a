"""Runs that score on a server: dumps, failures, a server that goes away and comes back, one that stays away."""

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from iiverl_core.config import Loaded
from iiverl_core.controller import train
from iiverl_core.rewards import TooManyFailures, remote
from iiverl_reward_client import Timeouts
from reward_servers import RewardServer, reward_server

Make = Callable[..., Loaded]


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def echo(body: dict) -> tuple[int, dict]:
    """How much of the word was said back."""
    said = body["llm_output"].split("=", 1)[1].removesuffix("<end>")
    word = json.loads(body["verification_info"])["answer"]["value"]
    right = sum(a == b for a, b in zip(said, word, strict=False))
    return 200, {"score": right / max(len(said), len(word))}


@pytest.fixture
def run(quickstart: Make, quickstart_inputs: Path, tmp_path: Path) -> Callable[..., Loaded]:
    """The quickstart's configuration with a dataset as reward servers want it."""
    rows = []
    for number, line in enumerate((quickstart_inputs / "train.jsonl").read_text().splitlines()[:64]):
        row = json.loads(line)
        info = {"type": "echo", "answer": {"value": row["ground_truth"]}}
        rows.append({"id": number, "messages": row["prompt"], "verification_info": json.dumps(info)})
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(server: RewardServer, *more: str) -> Loaded:
        return quickstart(
            f"data.train_files={tmp_path}/words.jsonl",
            f"data.val_files={tmp_path}/words.jsonl",
            "data.prompt_key=messages",
            "custom_reward_function.path=null",
            "reward_api.enable=true",
            f"reward_api.api_url={server.url}",
            "reward_api.timeout=5",
            f"reward_api.save_dir={tmp_path}/scored",
            *more,
        )

    return make


def test_a_run_and_its_dumps(run, tmp_path: Path) -> None:
    with reward_server(echo) as server:
        train(run(server, "trainer.test_freq=2", "reward_api.save_freq=2"))
    assert len(server.requests) == 3 * 16 + 2 * 64
    assert sorted(
        p.relative_to(tmp_path / "scored").as_posix() for p in (tmp_path / "scored").rglob("*.parquet")
    ) == [
        "train/2.parquet",
        "val/2.parquet",
        "val/3.parquet",
    ]
    rows = pq.read_table(tmp_path / "scored" / "train" / "2.parquet").to_pylist()
    assert len(rows) == 16
    for row in rows:
        assert row["llm_output"].split("=")[0] == json.loads(row["verification_info"])["answer"]["value"]
        assert row["score"] == echo(row)[1]["score"]
        assert row["outcome"] == "scored" and row["seconds"] > 0 and row["id"].isdigit()
        assert row["llm_output"].endswith("=" + row["response"])
    record = history(tmp_path / "run")[0]
    assert 0 <= record["reward/hidden_fraction"] <= 1
    assert record["reward/failed"] == 0


def test_a_failed_sample_changes_no_other_sample_s_sign(run, tmp_path: Path) -> None:
    """Every sample with an 'a' fails: the survivors' advantages have the signs that their scores give them."""

    def refuses_a(body: dict):
        return (422, {"detail": "no a, please"}) if "a" in body["llm_output"].split("=", 1)[1] else echo(body)

    with reward_server(refuses_a) as server:
        train(run(server, "reward_api.max_failed_fraction=0.9", "actor_rollout_ref.rollout.n=8"))
    rows = pq.read_table(tmp_path / "run" / "samples" / "1.parquet").to_pylist()
    assert {row["outcome"] for row in rows} == {"scored", "bad_request"}
    for group in range(4):
        scored = [row for row in rows if row["group"] == group and row["outcome"] == "scored"]
        mean = sum(row["score"] for row in scored) / len(scored)
        for row in scored:
            assert (row["advantage"] > 1e-6) == (row["score"] - mean > 1e-6)
    dump = pq.read_table(tmp_path / "scored" / "train" / "1.parquet").to_pylist()
    failed = [row for row in dump if row["outcome"] == "bad_request"]
    assert failed and all(row["score"] is None and "no a, please" in row["detail"] for row in failed)
    assert history(tmp_path / "run")[0]["reward/failed/bad_request"] == len(failed)


def test_a_constant_in_place_of_failures_is_counted_as_what_it_is(run, tmp_path: Path) -> None:
    with reward_server(
        lambda body: (422, {"detail": "never"}) if "b" in body["llm_output"][5:] else echo(body)
    ) as s:
        constant = ("reward_api.on_failure=constant", "reward_api.failure_score=-1")
        train(run(s, *constant, "reward_api.max_failed_fraction=0.9", "trainer.total_training_steps=1"))
    record = history(tmp_path / "run")[0]
    assert record["critic/score/min"] == -1
    assert record["reward/failed"] == record["reward/failed/bad_request"] > 0
    assert record["reward/dropped_samples"] == 0


def test_a_server_restarted_in_the_middle_of_a_step(run, tmp_path: Path) -> None:
    seen = {"count": 0}

    def goes_away_once(body: dict):
        seen["count"] += 1
        if seen["count"] == 20:  # in the second step
            restart()
        return echo(body)

    with reward_server(goes_away_once) as server:

        def restart() -> None:
            server.stop()
            threading.Timer(1.0, server.start).start()

        train(run(server))
    records = history(tmp_path / "run")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["reward/failed"] == 0 for record in records)


def test_a_server_that_stays_dead_stops_the_run_with_a_diagnosis(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "Timeouts", lambda **_: Timeouts(connect=0.5, read=0.5, sample=0.5))
    seen = {"count": 0}

    def dies(body: dict):
        seen["count"] += 1
        if seen["count"] == 17:
            server.stop()
        if seen["count"] >= 17:
            raise ConnectionError("dead")
        return echo(body)

    with reward_server(dies) as server, pytest.raises(TooManyFailures) as caught:
        train(run(server, "reward_api.outage_patience=1"))
    message = str(caught.value)
    assert server.url in message and "of 16 samples could not be scored" in message and "transport" in message
    assert [record["step"] for record in history(tmp_path / "run")] == [1]  # what there was is kept
    assert "stopped after 1 of 3 steps" in capsys.readouterr().out
    last = pq.read_table(tmp_path / "scored" / "train" / "2.parquet").to_pylist()
    assert len(last) == 16 and {row["outcome"] for row in last} == {"transport"}
    assert len(pq.read_table(tmp_path / "run" / "samples" / "2.parquet")) == 16
