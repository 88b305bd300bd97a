"""Loading a user's reward function, and what becomes of all that it may do."""

import asyncio
import math
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.config import CustomRewardFunctionConfig
from iiverl_core.errors import ConfigError
from iiverl_core.reward_process import ReturnError, parts_of_return
from iiverl_core.rewards.custom import CustomFunction, load_custom_function
from iiverl_reward_client import Failed, Scored


def outcome_of_return(returned: object) -> Scored | Failed:
    try:
        return Scored(*parts_of_return(returned))
    except ReturnError as error:
        return Failed("function", detail=str(error))


HEADER = "def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):\n    "


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., CustomFunction]:
    """Loads the function of a file with the given source."""

    def _load(source: str, name: str = "compute_score", **kwargs: Any) -> CustomFunction:
        file = tmp_path / "my_reward.py"
        file.write_text(source)
        return load_custom_function(
            CustomRewardFunctionConfig(path=str(file), name=name, reward_kwargs=kwargs)
        )

    return _load


def test_the_function_gets_the_row_the_response_and_the_keyword_arguments(load, make_sample):
    function = load(
        "def judge(*, extra_info, ground_truth, solution_str, data_source, scale, **rest):\n"
        "    return {'score': scale, 'got': (data_source, solution_str, ground_truth, extra_info), 'rest': rest}\n",
        name="judge",
        scale=3,
        more="x",
    )
    sample = make_sample("text", "72", "my/source", extra_info={"index": 7}, other="column")
    got = ("my/source", "text", "72", {"other": "column", "index": 7})
    assert function(sample) == Scored(3.0, {}, {"got": got, "rest": {"more": "x"}})


def test_extra_info_is_none_if_the_dataset_has_no_other_column(load, make_sample):
    assert load(HEADER + "return extra_info is None")(make_sample("text")) == Scored(1.0)


def test_the_path_may_begin_with_the_home_folder(tmp_path, monkeypatch, make_sample):
    (tmp_path / "reward").write_text(HEADER + "return 1")
    monkeypatch.setenv("HOME", str(tmp_path))
    function = load_custom_function(CustomRewardFunctionConfig(path="~/reward"))
    assert function(make_sample()) == Scored(1.0)


def test_a_file_may_define_dataclasses_and_callable_objects(load, make_sample):
    source = (
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Judge:\n"
        "    worth: float\n"
        "    def __call__(self, data_source, solution_str, ground_truth, extra_info):\n"
        "        return self.worth\n"
        "compute_score = Judge(0.25)\n"
    )
    assert load(source)(make_sample()) == Scored(0.25)


def test_an_async_function_is_awaited(load, make_sample):
    source = (
        "import asyncio\nasync " + HEADER + "await asyncio.sleep(0)\n    return {'score': 0.5, 'tokens': 12}"
    )
    outcome = load(source)(make_sample())
    assert asyncio.run(outcome) == Scored(0.5, {"tokens": 12.0})


NUMBERS = [
    (1, 1.0),
    (0, 0.0),
    (-2.5, -2.5),
    (True, 1.0),
    (False, 0.0),
    (np.float32(0.5), 0.5),
    (np.float64(0.5), 0.5),
    (np.int64(3), 3.0),
    (np.bool_(True), 1.0),
    (Fraction(1, 4), 0.25),
    (Decimal("0.25"), 0.25),
    (np.array(0.5), 0.5),
    (np.array([0.5]), 0.5),
    (np.array([[True]]), 1.0),
    (np.array(Decimal("0.25")), 0.25),
    (torch.tensor(0.5), 0.5),
    (torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True), 0.5),
    (torch.tensor([[3]]), 3.0),
]


@pytest.mark.parametrize(("returned", "score"), NUMBERS)
def test_numbers_are_scores(returned, score):
    outcome = outcome_of_return(returned)
    assert isinstance(outcome, Scored)
    assert outcome == Scored(score)
    assert type(outcome.score) is float
    assert outcome_of_return({"score": returned}) == Scored(score)


def test_the_rest_of_a_dict_becomes_components_and_info():
    returned = {
        "score": 1,
        "acc": True,
        "length": np.int64(5),
        "pred": "72",
        "loss": math.nan,
        "steps": [1],
        7: None,
    }
    outcome = outcome_of_return(returned)
    assert isinstance(outcome, Scored)
    assert outcome.components == {"acc": 1.0, "length": 5.0}
    assert set(outcome.info) == {"pred", "loss", "steps", "7"}
    assert outcome.info["pred"] == "72"


NOTHING = [
    (None, "returned None"),
    (math.nan, "nan of type float"),
    (math.inf, "inf of type float"),
    (np.float32("nan"), "of type float32"),
    (10**400, "of type int"),
    (1e39, "1e+39 of type float, which is not a finite number that fp32 can hold"),
    (-1e39, "of type float"),
    ("1.0", "'1.0' of type str"),
    ([1.0], "[1.0] of type list"),
    ((1.0, {}), "of type tuple"),
    (np.array([1.0, 2.0]), "of type ndarray"),
    (np.array([]), "of type ndarray"),
    (np.array(["1.0"]), "of type ndarray"),
    (np.array([math.nan]), "of type ndarray"),
    (torch.tensor([1.0, 2.0]), "of type Tensor"),
    (torch.tensor(math.inf), "of type Tensor"),
    (torch.zeros(1, device="meta"), "of type Tensor"),
    (Decimal("NaN"), "of type Decimal"),
    (Decimal("sNaN"), "of type Decimal"),
    (Decimal("1e400"), "of type Decimal"),
    (1j, "1j of type complex"),
    ({}, "a dict without 'score'; its keys: none"),
    ({"reward": 1.0, "acc": 1}, "a dict without 'score'; its keys: 'reward', 'acc'"),
    ({"score": None}, "a dict whose 'score' is None"),
    ({"score": math.nan}, "a dict whose 'score' is nan"),
    ({"score": "1"}, "a dict whose 'score' is '1' of type str"),
]


@pytest.mark.parametrize(("returned", "detail"), NOTHING)
def test_what_is_no_score_is_a_failure_that_names_it(returned, detail):
    outcome = outcome_of_return(returned)
    assert isinstance(outcome, Failed)
    assert outcome.kind == "function"
    assert detail in outcome.detail


def test_a_long_return_value_is_shown_briefly():
    outcome = outcome_of_return("x" * 100_000)
    assert isinstance(outcome, Failed)
    assert len(outcome.detail) < 300


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.complex_numbers()


@given(
    VALUES
    | st.lists(VALUES)
    | st.dictionaries(st.sampled_from(["score", "acc", "x"]) | st.integers(), VALUES)
)
def test_no_return_value_raises_and_only_finite_numbers_are_scores(returned):
    outcome = outcome_of_return(returned)
    value = returned.get("score") if isinstance(returned, dict) else returned
    if isinstance(value, int | float) and abs(value) <= float.fromhex("0x1.fffffep127"):  # what fp32 can hold
        assert isinstance(outcome, Scored)
        assert outcome.score == float(value)
        assert all(math.isfinite(component) for component in outcome.components.values())
    else:
        assert isinstance(outcome, Failed)


def test_an_exception_tells_the_last_lines_in_the_users_file(load, make_sample):
    source = (
        "import json\ndef helper(text):\n    return json.loads(text)\n"
        + HEADER
        + "return helper(solution_str)\n"
    )
    outcome = load(source)(make_sample("no json"))
    assert outcome == Failed(
        "function",
        detail="my_reward.py, line 5, in compute_score: return helper(solution_str)\n"
        "my_reward.py, line 3, in helper: return json.loads(text)\n"
        "json.decoder.JSONDecodeError: Expecting value: line 1 column 1 (char 0)",
    )


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", "ZeroDivisionError: division by zero"),
        ("return missing", "NameError: name 'missing' is not defined"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("raise asyncio.CancelledError()", "CancelledError"),
        ("raise ValueError('x' * 100_000)", "ValueError: xxx"),
    ],
)
def test_no_exception_of_the_users_gets_out(load, make_sample, body, message, is_async):
    function = load("import asyncio\n" + ("async " if is_async else "") + HEADER + body)
    outcome = asyncio.run(function(make_sample())) if is_async else function(make_sample())
    assert isinstance(outcome, Failed)
    assert outcome.kind == "function"
    assert message in outcome.detail
    assert "my_reward.py, line" in outcome.detail
    assert len(outcome.detail) < 1500


def test_endless_recursion_is_a_failure_of_few_lines(load, make_sample):
    outcome = load(HEADER + "return compute_score(data_source, solution_str, ground_truth)")(make_sample())
    assert isinstance(outcome, Failed)
    assert "RecursionError" in outcome.detail
    assert len(outcome.detail.splitlines()) <= 4


REFUSED = [
    ("def other(x): pass\nclass Judge: pass\n_hidden = 1\nfrom math import sqrt", "other, Judge"),
    ("x = 1", "no functions"),
]


@pytest.mark.parametrize(("source", "defined"), REFUSED)
def test_a_missing_name_is_told_with_what_there_is(load, source, defined):
    with pytest.raises(ConfigError) as caught:
        load(source)
    assert "my_reward.py does not define 'compute_score'" in str(caught.value)
    assert f"It defines: {defined}." in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_name_that_is_no_function_is_told(load):
    with pytest.raises(
        ConfigError, match=r"'compute_score' in .*my_reward.py is not a function but 0.5 of type float"
    ):
        load("compute_score = 0.5")


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    with pytest.raises(ConfigError, match=r"custom_reward_function.path: .*/missing.py does not exist"):
        load_custom_function(CustomRewardFunctionConfig(path=str(tmp_path / "missing.py")))
    with pytest.raises(ConfigError, match="is a folder, not a Python file"):
        load_custom_function(CustomRewardFunctionConfig(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("source", "kwargs", "messages"),
    [
        (
            "def compute_score(data_source, solution_str, ground_truth): return 0",
            {},
            [
                "unexpected keyword argument 'extra_info'",
                "(data_source, solution_str, ground_truth, extra_info).",
            ],
        ),
        (
            "def compute_score(data_source, solution_str, ground_truth, extra_info, tokenizer): return 0",
            {},
            ["missing a required", "'tokenizer'"],
        ),
        (
            "def compute_score(data_source, solution_str, ground_truth, extra_info): return 0",
            {"scale": 2},
            ["unexpected keyword argument 'scale'", "extra_info, scale)."],
        ),
        ("def compute_score(prompt, response): return 0", {}, ["compute_score(prompt, response)"]),
        ("def compute_score(**kwargs): return 0", {"extra_info": 1}, ["reward_kwargs: extra_info"]),
    ],
)
def test_a_signature_that_does_not_take_the_arguments_is_told(load, source, kwargs, messages):
    with pytest.raises(ConfigError) as caught:
        load(source, **kwargs)
    for message in messages:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("source", "messages"),
    [
        (
            "import math\nimport no_such_module\n",
            ["line 2, in <module>: import no_such_module", "ModuleNotFoundError"],
        ),
        ("x = 1\ndef f(:\n", ["line 2", "def f(:", "SyntaxError"]),
        ("def f():\n    raise KeyError('no key')\nf()\n", ["line 3", "line 2, in f", "KeyError: 'no key'"]),
        ("import sys\nsys.exit('usage: …')\n", ["line 2", "SystemExit: usage: …"]),
    ],
)
def test_an_import_that_fails_shows_the_line(load, source, messages):
    with pytest.raises(ConfigError) as caught:
        load(source)
    for message in ["custom_reward_function.path: importing", *messages]:
        assert message in str(caught.value)
    assert "importlib" not in str(caught.value)


def test_the_file_may_import_its_neighbours(load, make_sample, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [*sys.path])
    (tmp_path / "neighbour_of_the_reward.py").write_text("def judge(text):\n    return len(text)\n")
    function = load("from neighbour_of_the_reward import judge\n" + HEADER + "return judge(solution_str)")
    assert function(make_sample("four")) == Scored(4.0)
