"""Rows from local files and folders."""

import csv
import errno
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iiverl_core.data import DataError, Table, load_table, parse_dataset
from iiverl_core.data.sources import load_tables
from iiverl_core.data_files import HubDataset

ROWS = [{"prompt": f"question {i}", "answer": i, "extra_info": {"index": i}} for i in range(3)]


def read(path: Path | str, split: str = "train") -> Table:
    return load_table(parse_dataset(str(path), split))


def rows_of(table: Table) -> list[dict[str, Any]]:
    return [dict(table.row(i)) for i in range(len(table))]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        case ".arrow":
            table = pa.Table.from_pylist(rows)
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows, indent=2))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl", ".json"])
def test_a_file_gives_its_rows(tmp_path: Path, suffix: str) -> None:
    table = read(write(tmp_path / f"train{suffix}", ROWS))
    assert rows_of(table) == ROWS
    assert table.columns == ("prompt", "answer", "extra_info")
    assert [value for values in table.column("answer") for value in values] == [0, 1, 2]


def test_an_arrow_stream_gives_its_rows(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert rows_of(read(next((tmp_path / "saved").glob("*.arrow")))) == ROWS


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "train.parquet", ROWS)
    read(path)
    write(path, ROWS[:1])
    assert rows_of(read(path)) == ROWS[:1]


def test_a_name_with_pattern_characters_is_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "run[1] *"
    folder.mkdir()
    assert rows_of(read(write(folder / "a?.parquet", ROWS))) == ROWS


def test_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "train.jsonl", ROWS)
    assert rows_of(read("~/train.jsonl")) == ROWS


def test_a_saved_dataset_is_taken_whole_and_without_its_format(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).with_format("numpy").save_to_disk(tmp_path / "saved")
    table = read(tmp_path / "saved", split="no such split")
    assert rows_of(table) == ROWS
    assert type(table.row(0)["answer"]) is int


def test_a_saved_dict_gives_the_split_asked_for(tmp_path: Path) -> None:
    splits = DatasetDict([("train", Dataset.from_list(ROWS)), ("test", Dataset.from_list(ROWS[:1]))])
    splits.save_to_disk(str(tmp_path / "saved"))
    assert len(read(tmp_path / "saved", "train")) == 3
    assert len(read(tmp_path / "saved", "test")) == 1
    with pytest.raises(
        DataError, match=r"saved has no split 'tests'; did you mean 'test'\?\nIt has: train, test"
    ):
        read(tmp_path / "saved", "tests")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/name", HubDataset("org/name")),
        ("org/name:main", HubDataset("org/name", "main")),
        ("org/name@v1.0", HubDataset("org/name", None, "v1.0")),
        ("org/name:main@refs/convert/parquet", HubDataset("org/name", "main", "refs/convert/parquet")),
        ("org/my.data-set_1:wiki-1.0@0a1b", HubDataset("org/my.data-set_1", "wiki-1.0", "0a1b")),
        ("org/name@v1.json", HubDataset("org/name", None, "v1.json")),
    ],
)
def test_names_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: HubDataset
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_dataset(name, "train").place == expected
    assert str(expected) == name


def test_a_path_that_exists_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Dataset.from_list(ROWS).save_to_disk("org/name")
    assert rows_of(read("org/name")) == ROWS


@pytest.mark.parametrize(
    "name", ["/no/such", "./org/name", "../org", "gsm8k", "~/org", "data/x.parquet", "a/b/c", "hdfs://x/y"]
)
def test_a_path_that_does_not_exist_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"does not exist(.|\n)*org/name:config@revision") as caught:
        parse_dataset(name, "train")
    assert str(caught.value).startswith(f"{name} does not exist.")


def test_a_misspelt_file_is_answered_with_the_ones_there(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "notes.md").touch()
    with pytest.raises(DataError, match=r"has train\.jsonl\.\n"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"has train\.jsonl\.\n"):
        read(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"The folder .*nowhere does not exist either"):
        read(tmp_path / "nowhere" / "train.jsonl")


def test_a_folder_of_files_is_answered_with_the_files(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.parquet", ROWS)
    with pytest.raises(
        DataError, match=rf"not written by save_to_disk(.|\n)*has data{os.sep}train\.parquet: use"
    ):
        read(tmp_path)


def test_a_saved_folder_that_lacks_a_part_is_told(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).unlink()
    with pytest.raises(DataError, match=r"save_to_disk folder .*saved cannot be read: .*\.arrow"):
        read(tmp_path / "saved")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    for content in ('{"prompt": "x"}', '[{"prompt": "x"}]'):
        (tmp_path / "a.json").write_text(content, encoding="utf-8-sig")
        assert rows_of(read(tmp_path / "a.json")) == [{"prompt": "x"}]


def test_files_that_cannot_be_read_name_themselves(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.md is not a supported data file: use \.parquet"):
        read(tmp_path / "notes.md")
    for kind in ("parquet", "arrow"):
        (tmp_path / f"broken.{kind}").write_text("neither of the two")
        with pytest.raises(DataError, match=rf"broken\.{kind} cannot be read as {kind}: \w+"):
            read(tmp_path / f"broken.{kind}")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl", ".json", ".csv"])
def test_no_rows_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"none{suffix}"
    if suffix in (".parquet", ".arrow"):
        write(path, ROWS[:0])
    elif suffix == ".csv":
        path.write_text("prompt,answer\n")
    else:
        path.write_text("" if suffix == ".jsonl" else "[]")
    with pytest.raises(DataError, match=rf"none\{suffix} has no rows"):
        read(path)


def test_one_split_for_all_or_one_for_each(tmp_path: Path) -> None:
    splits = DatasetDict([("train", Dataset.from_list(ROWS)), ("test", Dataset.from_list(ROWS[:1]))])
    splits.save_to_disk(str(tmp_path / "saved"))
    names = [str(tmp_path / "saved")] * 2
    assert [len(table) for table in load_tables(names, ["train"])] == [3, 3]
    assert [len(table) for table in load_tables(names, ["test", "train"])] == [1, 3]
    with pytest.raises(DataError, match="There are 3 splits"):
        load_tables(names, ["train"] * 3)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", min_size=1), inner, max_size=3),
    max_leaves=6,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from("abc"), json_values, min_size=1), min_size=1), st.booleans())
def test_json_values_stay_what_they_are(tmp_path: Path, rows: list[dict[str, Any]], lines: bool) -> None:
    path = tmp_path / "rows.json"
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n\n".join(texts) if lines else f"\n[{', '.join(texts)}]", encoding="utf-8")
    table = read(path)
    assert rows_of(table) == rows
    assert set(table.columns) == {column for row in rows for column in row}


@pytest.mark.parametrize("answer", ["2024-01-01", "007", "1.0", "None", "NA", "", "1e5", "true"])
def test_an_answer_is_never_taken_for_another_type(tmp_path: Path, answer: str) -> None:
    write(tmp_path / "a.jsonl", [{"prompt": "x", "ground_truth": answer}])
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "ground_truth"], ["x", answer]])
    for path in (tmp_path / "a.jsonl", tmp_path / "a.csv"):
        assert rows_of(read(path)) == [{"prompt": "x", "ground_truth": answer}]


def test_csv_cells_hold_commas_line_breaks_and_long_texts(tmp_path: Path) -> None:
    cells = ['a, "b"', "one\ntwo", "x" * 200_000]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["prompt"], *([cell] for cell in cells)])
    assert rows_of(read(tmp_path / "a.csv")) == [{"prompt": cell} for cell in cells]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n\n{"a": oops}\n',
            r"a\.jsonl: line 3 is not JSON: Expecting value \(column 7\)",
        ),
        ("a.jsonl", b'{"a": 1}\n"hello"\n', r"a\.jsonl: line 2 is of type str, not an object"),
        ("a.json", b'[{"a": 1},\n{"a": 2]', r"a\.json: line 2 is not JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"a": 1}, 7]', r"a\.json: row 1 \(the first is 0\) is of type int, not an object"),
        ("a.json", b'{\n "data": []\n}', r"a\.json: line 1 is not JSON(.|\n)*one array of them"),
        ("a.jsonl", '{"a": "é"}'.encode("latin-1"), r"a\.jsonl is not UTF-8 text"),
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv: line 3 does not have the 2 cells"),
        ("a.csv", b"a,b\n1,2,3\n", r"a\.csv: line 2 does not have the 2 cells"),
        ("a.csv", b'a,b\n1,"2\n', r"a\.csv: line \d is not CSV: unexpected end of data"),
        ("a.csv", b"a,b\n\xff,2\n", r"a\.csv is not UTF-8 text"),
    ],
)
def test_broken_text_files_name_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("cause", [errno.ENOTDIR, errno.ENOSPC, errno.EACCES])
def test_a_cache_that_cannot_be_written_is_not_the_files_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cause: int
) -> None:
    Dataset.from_dict({"prompt": ["a"]}).to_parquet(tmp_path / "a.parquet")

    def fail(*_: object, **__: object) -> None:
        try:
            raise OSError(cause, os.strerror(cause), "/cache/parquet")
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(
        DataError, match=rf"cache of the datasets library, .*{os.strerror(cause)}.*\nSet HF_HOME"
    ):
        load_table(parse_dataset(str(tmp_path / "a.parquet"), "train"))
