"""An earlier run's samples, scored again."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.errors import ConfigError
from iiverl_core.rewards import shape_overlong
from iiverl_core.rewards.rescoring import compare, read_dumps, rescore, with_outcomes
from iiverl_core.samples import Rollout
from iiverl_core.telemetry import write_scored
from iiverl_reward_client import Failed, Outcome, RewardClient, Scored, SyncRewardClient
from rewards.score_server import ScoreServer


def info(value: str) -> str:
    return json.dumps({"type": "math_verifiable", "answer": {"value": value}})


def dump(path: Path, *rows: tuple[str, str, float | None], **columns: list) -> Path:
    """Write rows of (llm_output, answer, score) as II-VERL does, with more columns beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    outputs, answers, scores = zip(*rows, strict=True)
    table = {"llm_output": outputs, "verification_info": [info(a) for a in answers], "score": scores}
    pq.write_table(pa.table(table | columns), path)
    return path


def again(table: pa.Table, server: ScoreServer) -> list[Outcome]:
    done = []
    with SyncRewardClient(RewardClient(server.url)) as client:
        outcomes = rescore(table, client, lambda: done.append(1))
    assert len(done) == len(table)
    return outcomes


@pytest.mark.parametrize("old", [False, True])
def test_a_dump_of_ii_verl_is_scored_again(tmp_path: Path, old: bool) -> None:
    place = dump(
        tmp_path / "3.parquet",
        (r"a \boxed{1}", "1", 1.0),
        (r"b \boxed{2}", "3", 1.0),
        (r"c \boxed{4}", "4", 0.0),
    )
    table = read_dumps(place)
    with ScoreServer(old=old) as server:
        outcomes = again(table, server)
    found = compare(table, outcomes)
    assert (found.same, found.higher, found.lower, found.gained, found.failed) == (1, 1, 1, 0, [])
    assert [(each.row, each.before, each.after) for each in found.differences] == [
        (1, 1.0, 0.0),
        (2, 0.0, 1.0),
    ]
    assert found.mean_before == found.mean_after == pytest.approx(2 / 3)


def test_what_a_run_wrote_is_sent_as_it_was(tmp_path: Path, make_sample: Callable[..., Rollout]) -> None:
    sample = make_sample(r"\boxed{5}", verification_info=info("5"))
    path = write_scored(tmp_path, "train", 1, [sample], "verification_info")
    with ScoreServer() as server:
        again(read_dumps(path), server)
    (sent,) = server.samples
    assert sent["llm_output"] == r"question\boxed{5}<end>"
    assert sent["response"].startswith(r"\boxed{5}")
    assert sent["verification_info"] == info("5")


@pytest.mark.parametrize("components", [{"reward_api": 1.0, "reward_model": -3.5}, {}])
def test_what_was_added_to_the_servers_score_is_no_difference(
    tmp_path: Path, make_sample: Callable[..., Rollout], components: dict[str, float]
) -> None:
    sample = make_sample(r"\boxed{5}", verification_info=info("5"))
    scored = {(0, 0): Scored(1.0 + components.get("reward_model", 0.0), components)}
    (outcome,) = shape_overlong(scored, {(0, 0): 9}, limit=10, buffer=3, factor=1.0).values()
    path = write_scored(tmp_path, "train", 1, [replace(sample, outcome=outcome)], "verification_info")
    table = read_dumps(path)
    assert table["score"].to_pylist() != [1.0]
    with ScoreServer(lambda text, info: 1.0) as server:
        found = compare(table, again(table, server))
    assert (found.same, found.differences, found.mean_before) == (1, [], 1.0)


def test_the_prompt_is_what_stands_before_the_response(tmp_path: Path) -> None:
    place = dump(
        tmp_path / "1.parquet",
        ("question answer", "1", 0.0),
        ("question other", "1", 0.0),
        response=["answer", "another"],
    )
    with ScoreServer() as server:
        again(read_dumps(place), server)
    assert {(sent["prompt"], sent["response"]) for sent in server.samples} == {
        ("question ", "answer"),
        (None, "another"),
    }


def test_a_folder_is_read_in_the_order_of_its_steps(tmp_path: Path) -> None:
    for step in (10, 9):
        dump(tmp_path / "train" / f"{step}.parquet", (f"{step}", "1", None), (f"{step} too", "1", 1.0))
    dump(tmp_path / "val" / "0.parquet", ("val", "1", 0.0), id=["x"])
    table = read_dumps(tmp_path)
    assert table["llm_output"].to_pylist() == ["9", "9 too", "10", "10 too", "val"]
    assert table["file"].to_pylist() == ["train/9.parquet"] * 2 + ["train/10.parquet"] * 2 + ["val/0.parquet"]
    assert table["id"].to_pylist() == [None] * 4 + ["x"]
    found = compare(table, [Scored(1.0), Scored(0.5), Scored(0.0), Scored(0.0), Failed("timeout")])
    assert (found.same, found.higher, found.lower, found.gained, len(found.failed)) == (0, 0, 2, 2, 1)
    assert [(each.file, each.row) for each in found.differences] == [
        ("train/10.parquet", 1),
        ("train/9.parquet", 1),
    ]


def test_a_constant_in_a_failed_samples_place_is_no_score(tmp_path: Path) -> None:
    place = dump(tmp_path / "1.parquet", ("a", "1", 0.0), ("b", "1", math.nan), outcome=["timeout", "scored"])
    table = read_dumps(place)
    found = compare(table, [Scored(0.0), Scored(1.0)])
    assert (found.same, found.gained, found.differences) == (0, 2, [])


def test_new_columns_hold_scores_and_failures(tmp_path: Path) -> None:
    table = read_dumps(dump(tmp_path / "1.parquet", ("a", "1", 1.0), ("b", "1", 1.0)))
    outcomes: list[Outcome] = [Scored(0.0, {"format": 1.0}), Failed("server", 6, "HTTP 500")]
    for _ in range(2):  # a file that was scored again may be scored again
        table = with_outcomes(table, outcomes)
    rows = table.to_pylist()
    assert [row["new_score"] for row in rows] == [0.0, None]
    assert [row["new_outcome"] for row in rows] == ["scored", "server"]
    assert [row["new_detail"] for row in rows] == [None, "HTTP 500"]
    assert json.loads(rows[0]["new_components"]) == {"format": 1.0}
    assert [row["score"] for row in rows] == [1.0, 1.0]


@given(st.lists(st.tuples(st.none() | st.floats(-2, 2), st.none() | st.floats(-2, 2)), min_size=1))
def test_every_sample_is_counted_once(pairs: list[tuple[float | None, float | None]]) -> None:
    table = pa.table(
        {
            "llm_output": ["x"] * len(pairs),
            "file": ["1.parquet"] * len(pairs),
            "score": pa.array([before for before, _ in pairs], pa.float64()),
        }
    )
    outcomes = [Failed("timeout") if after is None else Scored(after) for _, after in pairs]
    found = compare(table, outcomes)
    assert found.same + found.higher + found.lower + found.gained + len(found.failed) == len(pairs)
    sizes = [abs(each.after - each.before) for each in found.differences]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == found.higher + found.lower
    both = found.same + len(sizes)
    if both:
        rise = sum(each.after - each.before for each in found.differences)
        assert (found.mean_after - found.mean_before) * both == pytest.approx(rise, abs=1e-6)


def test_what_is_no_dump_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_dumps(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds no parquet file"):
        read_dumps(tmp_path)
    (tmp_path / "1.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match="cannot be read as parquet"):
        read_dumps(tmp_path / "1.parquet")
    pq.write_table(pa.table({"prompt": ["x"], "score": [1.0]}), tmp_path / "1.parquet")
    with pytest.raises(
        ConfigError, match=r"no column llm_output or verification_info.*It has: prompt, score"
    ):
        read_dumps(tmp_path / "1.parquet")
    dump(tmp_path / "1.parquet", ("a", "1", 1.0), extra=["text"])
    dump(tmp_path / "2.parquet", ("a", "1", 1.0), extra=[{"a": 1}])
    with pytest.raises(ConfigError, match="do not have the same columns"):
        read_dumps(tmp_path)
