import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iiverl_core.samples import Rollout, SampledTurn, SampleId, Thumbnail
from iiverl_core.telemetry.samples import SCHEMA, SampleNumbers, write_samples
from iiverl_reward_client import Failed, Scored
from rollouts import id_of, make_rollout

Make = Callable[..., Rollout]

COLUMNS = (
    "step data_source source row group member prompt response ground_truth score outcome failure_detail components reward "
    "baseline advantage rollout_log_prob_sum old_log_prob_sum ref_log_prob_sum response_length finish_reason weights_version "
    "weights_spans messages images"
)


def test_a_scored_and_a_failed_sample(tmp_path: Path, make_sample: Make):
    scored = make_sample(
        1, 0, outcome=Scored(0.5, {"format": 1.0}), ground_truth="42", text="x = ½\n\0", finish="length"
    )
    failed = make_sample(
        0, 2, outcome=Failed("timeout", detail="no answer in 30 s"), ground_truth={"answer": [1, 2]}
    )
    numbers: dict[SampleId, SampleNumbers] = {
        id_of(1, 0): {
            "reward": 0.4,
            "baseline": 0.25,
            "advantage": -1.0,
            "rollout_log_prob_sum": -3.5,
            "old_log_prob_sum": -3.25,
            "ref_log_prob_sum": -4.0,
        },
        id_of(0, 2): {"old_log_prob_sum": -9.0},
    }
    path = write_samples(tmp_path / "dumps", 12, [scored, failed], numbers)
    assert path == tmp_path / "dumps" / "12.parquet"
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"
    table = pq.read_table(path)
    assert table.column_names == COLUMNS.split()
    first, second = table.to_pylist()
    assert first == dict.fromkeys(COLUMNS.split()) | {
        "step": 12,
        "data_source": "org/set",
        "source": "rows.jsonl",
        "row": 10,
        "group": 0,
        "member": 2,
        "prompt": "a question",
        "response": "an answer",
        "ground_truth": '{"answer": [1, 2]}',
        "outcome": "timeout",
        "failure_detail": "no answer in 30 s",
        "rollout_log_prob_sum": -7.5,
        "old_log_prob_sum": -9.0,
        "response_length": 5,
        "finish_reason": "stop",
        "weights_version": 4,
        "weights_spans": None,
    }
    assert (second["group"], second["response"], second["ground_truth"]) == (1, "x = ½\n\0", "42")
    assert (second["score"], second["outcome"], second["finish_reason"]) == (0.5, "scored", "length")
    assert json.loads(second["components"]) == {"format": 1.0}
    assert {name: second[name] for name in numbers[id_of(1, 0)]} == numbers[id_of(1, 0)]


def test_a_conversation_says_what_the_policy_wrote(tmp_path: Path):
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    rollout = make_rollout(messages=messages, turns=(SampledTurn(1, 3, 0.5),))
    (row,) = pq.read_table(write_samples(tmp_path, 1, [rollout])).to_pylist()
    assert json.loads(row["messages"]) == [messages[0], {**messages[1], "tokens": 3, "reward": 0.5}]


def test_types_do_not_depend_on_what_is_null(tmp_path: Path, make_sample: Make):
    path = write_samples(tmp_path, 1, [make_sample()])
    assert pq.read_schema(path).equals(SCHEMA)
    (row,) = pq.read_table(path).to_pylist()
    assert row["outcome"] is row["score"] is row["reward"] is row["ground_truth"] is None
    assert pq.read_table(write_samples(tmp_path, 2, [])).schema.equals(SCHEMA)


def test_odd_values_are_written(tmp_path: Path, make_sample: Make):
    truth = {"array": np.arange(2), "path": Path("a")}
    sample = make_sample(outcome=Failed("function", detail="bad \ud800 text"), ground_truth=truth)
    (row,) = pq.read_table(write_samples(tmp_path, 1, [sample])).to_pylist()
    assert json.loads(row["ground_truth"]) == {"array": [0, 1], "path": "a"}
    assert row["failure_detail"] == "bad ? text"


def test_a_step_overwrites_itself_and_nothing_else(tmp_path: Path, make_sample: Make):
    for step in (1, 2):
        write_samples(tmp_path, step, [make_sample(text="old")])
    write_samples(tmp_path, 2, [make_sample(text="new")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.parquet", "2.parquet"]
    texts = [pq.read_table(tmp_path / f"{step}.parquet")["response"].to_pylist() for step in (1, 2)]
    assert texts == [["old"], ["new"]]


def test_thumbnails_are_beside_the_samples_each_once(tmp_path: Path):
    cat, dog = Thumbnail("ca", b"cat"), Thumbnail("d0", b"dog")
    write_samples(tmp_path, 1, [make_rollout(images=(cat,)), make_rollout(0, 1, images=(cat, dog))])
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}
    assert {path.name: path.read_bytes() for path in written} == {"ca.jpg": b"cat", "d0.jpg": b"dog"}
    (row,) = pq.read_table(write_samples(tmp_path, 2, [make_rollout(images=(dog, cat))])).to_pylist()
    assert row["images"] == ["d0", "ca"]
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}


def test_a_write_that_fails_leaves_the_former_file(
    tmp_path: Path, make_sample: Make, monkeypatch: pytest.MonkeyPatch
):
    write_samples(tmp_path, 1, [make_sample(text="old")])

    def broken(table: pa.Table, where: Path, **_: object) -> None:
        where.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(pq, "write_table", broken)
    with pytest.raises(OSError, match="disk full"):
        write_samples(tmp_path, 1, [make_sample(text="new")])
    (path,) = tmp_path.iterdir()
    assert pq.read_table(path)["response"].to_pylist() == ["old"]
