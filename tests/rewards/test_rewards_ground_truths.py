"""What scores by a ground truth is given one, or the run does not start."""

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from iiverl_core.config import RunConfig, build, run_config
from iiverl_core.data import PromptSet, load_prompts
from iiverl_core.errors import ConfigError
from iiverl_core.rewards import check_ground_truths

TAKES = "def compute_score(data_source, solution_str, ground_truth, extra_info): return 0"
NAMED_ONLY = "def compute_score(*, ground_truth, **_): return 0"
NEEDS_NONE = "def compute_score(solution_str, **_): return len(solution_str)"
SERVER = {"reward_api": {"enable": True, "api_url": "http://localhost:1"}}
MODEL = {"reward_model": {"enable": True}}


@pytest.fixture
def prompts(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast):
    def make(rows: list[dict[str, Any]], **keys: Any) -> PromptSet:
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps({"prompt": "a", **row}) + "\n" for row in rows))
        return load_prompts(
            str(path),
            "train",
            tiny_tokenizer,
            max_prompt_length=9,
            console=Console(file=io.StringIO()),
            **keys,
        )

    return make


def config(tmp_path: Path, function: str | None = None, **sections: Any) -> RunConfig:
    if function is None:
        return run_config(build(sections))
    (tmp_path / "own.py").write_text(function)
    return run_config(build({"custom_reward_function": {"path": str(tmp_path / "own.py")}, **sections}))


@pytest.mark.parametrize(
    ("function", "taker"),
    [(TAKES, "the function compute_score needs"), (NAMED_ONLY, "compute_score needs"), (None, "rules need")],
)
@pytest.mark.parametrize("rows", [[{"answer": "5", "level": 1}] * 3, [{"answer": "5", "ground_truth": None}]])
def test_no_row_with_one_is_an_error_that_names_columns_and_key(
    tmp_path: Path, prompts, function: str | None, taker: str, rows: list[dict[str, Any]]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_ground_truths(config(tmp_path, function), prompts(rows))
    message = str(caught.value)
    assert f"no row of {tmp_path}/train.jsonl has a ground truth, which" in message
    assert taker in message
    assert "The other columns are answer" in message
    assert "set data.ground_truth_key to the column with the ground truth, such as answer." in message
    assert ("**kwargs" in message) == (function is not None)
    assert caught.value.exit_code == 2


def test_the_key_that_the_error_names_is_what_was_missing(tmp_path: Path, prompts) -> None:
    rows = [{"answer": "5"}] * 3
    check_ground_truths(config(tmp_path, TAKES), prompts(rows, ground_truth_key="answer"))


@pytest.mark.parametrize(
    ("function", "sections"), [(NEEDS_NONE, {}), (None, SERVER), (None, MODEL), (NEEDS_NONE, MODEL)]
)
def test_what_takes_none_is_not_asked(
    tmp_path: Path, prompts, function: str | None, sections: dict[str, Any]
) -> None:
    check_ground_truths(config(tmp_path, function, **sections), prompts([{"answer": "5"}]))


def test_a_function_beside_a_reward_model_is_asked(tmp_path: Path, prompts) -> None:
    with pytest.raises(ConfigError, match="no row of"):
        check_ground_truths(config(tmp_path, TAKES, **MODEL), prompts([{"answer": "5"}]))


def test_single_rows_without_one_are_counted(tmp_path: Path, prompts, caplog) -> None:
    rows = [{"ground_truth": None if i in (3, 7) else str(i)} for i in range(9)]
    with caplog.at_level(logging.WARNING):
        check_ground_truths(config(tmp_path, TAKES), prompts(rows))
    (told,) = caplog.messages
    assert told.startswith("2 of 9 rows of")
    assert told.endswith("the first is " + str(tmp_path / "train.jsonl") + ", row 3 (the first is 0)")
