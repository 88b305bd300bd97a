"""Which columns become ground truth, data source and `extra_info`."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from iiverl_core.columns import extra_info_of, ground_truth_of, is_given, pop_ground_truth
from iiverl_core.data import DataError, PromptSet, load_prompts

VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "2+3?"}],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "5"},
    "extra_info": {"split": "train", "index": 0},
}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(files: str | list[str], tokenizer: PreTrainedTokenizerFast, **keys: Any) -> PromptSet:
    return load_prompts(
        files, "train", tokenizer, max_prompt_length=512, console=Console(file=io.StringIO()), **keys
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("row", "keys", "ground_truth", "extra_info"),
    [
        pytest.param(VERL, {}, "5", {"ability": "math", "split": "train", "index": 0}, id="verl"),
        pytest.param({"prompt": "a", "ground_truth": "5"}, {}, "5", None, id="nothing else"),
        pytest.param(
            {"prompt": "a", "answer": "5", "level": 2},
            {"ground_truth_key": "answer"},
            "5",
            {"level": 2},
            id="named",
        ),
        pytest.param(
            {"prompt": "a", "answer": "5", "level": 2}, {}, None, {"answer": "5", "level": 2}, id="not named"
        ),
        pytest.param(
            {**VERL, "answer": "6"},
            {"ground_truth_key": "answer"},
            "6",
            {"ability": "math", "split": "train", "index": 0},
            id="the key comes before verl's",
        ),
        pytest.param(
            {"prompt": "a", "ground_truth": "5", "level": 2, "extra_info": {"level": 3}},
            {},
            "5",
            {"level": 3},
            id="own fields win",
        ),
        pytest.param(
            {"prompt": "a", "ground_truth": "5", "level": 2, "extra_info": "as it is"},
            {},
            "5",
            "as it is",
            id="a text stays one",
        ),
        pytest.param(
            {"prompt": "a", "ground_truth": "5", "reward_model": {"style": "rule"}},
            {},
            "5",
            {"reward_model": {"style": "rule"}},
            id="a reward_model that holds no ground truth",
        ),
        pytest.param(
            {"prompt": "a", "verification_info": "{}"},
            {},
            None,
            {"verification_info": "{}"},
            id="reward server",
        ),
    ],
)
def test_columns_reach_the_reward(
    tmp_path: Path,
    tiny_tokenizer: PreTrainedTokenizerFast,
    suffix: str,
    row: dict[str, Any],
    keys: dict[str, str],
    ground_truth: Any,
    extra_info: Any,
) -> None:
    (prompt,) = load(write(tmp_path / f"a{suffix}", [row]), tiny_tokenizer, **keys)
    assert prompt.ground_truth == ground_truth
    assert extra_info_of(prompt.columns) == extra_info


def test_the_data_source_is_the_column_that_is_named(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "a", "task": "openai/gsm8k", "data_source": "mine"}])
    (prompt,) = load(path, tiny_tokenizer, data_source_key="task")
    assert prompt.data_source == "openai/gsm8k"
    assert extra_info_of(prompt.columns) == {"data_source": "mine"}


@pytest.mark.parametrize("key", ["ground_truth_key", "data_source_key"])
def test_a_column_that_is_named_and_not_there(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, key: str
) -> None:
    files = [write(tmp_path / f"{name}.jsonl", [{"prompt": "a", name: "5"}]) for name in ("answer", "other")]
    with pytest.raises(DataError, match=rf"other\.jsonl has no column 'answer'(.|\n)*Set data\.{key} to"):
        load(files, tiny_tokenizer, **{key: "answer"})


VALUES = st.none() | st.integers() | st.text(max_size=3)
ROWS = st.dictionaries(st.sampled_from("abc"), VALUES)
OWN = st.none() | st.text() | st.lists(VALUES) | st.dictionaries(st.sampled_from("abcd"), VALUES)


@given(ROWS, OWN)
def test_an_extra_info_of_the_dataset_is_kept(columns: dict[str, Any], own: Any) -> None:
    made = extra_info_of({**columns, "extra_info": own})
    if isinstance(own, dict):
        assert made == {**columns, **own}
    else:
        assert made == (own if own is not None else columns or None)


@given(VALUES, st.none() | st.fixed_dictionaries({"ground_truth": VALUES}), st.booleans())
def test_a_ground_truth_is_read_the_same_way_everywhere(value: Any, verl: Any, named: bool) -> None:
    row = {"reward_model": verl, "ground_truth": value, "other": 1}
    key = "other" if named else None
    columns = dict(row)
    assert pop_ground_truth(columns, key) == ground_truth_of(row, key)
    inner = verl and verl["ground_truth"]
    assert ground_truth_of(row, key) == (1 if named else value if inner is None else inner)
    assert {"other", "ground_truth", "reward_model"} - set(columns) <= {key or "ground_truth"}


@pytest.mark.parametrize("filtered", [False, True])
def test_prompts_without_a_ground_truth_are_found_without_decoding(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, filtered: bool
) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a" * (600 if i % 5 == 1 else 9), "ground_truth": [0, None, "", "x"][i % 4]}
        for i in range(2500)
    ]
    verl = [
        {**VERL, "reward_model": {"style": "rule", "ground_truth": "5" if i % 3 else None}} for i in range(7)
    ]
    files = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.parquet", verl)]
    files.append(write(tmp_path / "c.jsonl", [{"prompt": "c"}] * 3))
    prompts = load(files, tiny_tokenizer, filter_overlong=filtered, truncation="right")
    expected = [i for i, prompt in enumerate(prompts) if not is_given(prompt.ground_truth)]
    assert prompts.without_ground_truth().tolist() == expected
    assert len(expected) > 500
    last = len(prompts) - 1
    assert prompts.place(last).endswith("c.jsonl, row 2 (the first is 0)")
    assert prompts.place(0).endswith("a.jsonl, row 0 (the first is 0)")
    assert np.all(np.diff(expected) > 0)
