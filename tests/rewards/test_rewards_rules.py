"""Which rule scores which data source, and what is told where there is none."""

import pickle

import pytest

from iiverl_core.errors import IIVerlError
from iiverl_core.rewards.rules import (
    RULES,
    UnknownDataSource,
    check_data_sources,
    geometry3k,
    gsm8k,
    math,
    rule_for,
)


@pytest.mark.parametrize(
    ("data_source", "rule"),
    [
        ("openai/gsm8k", gsm8k.score),
        ("lighteval/MATH", math.score),
        ("DigitalLearningGmbH/MATH-lighteval", math.score),
        ("HuggingFaceH4/MATH-500", math.score),
        ("HuggingFaceH4/MATH-anything", math.score),
        ("hiyouga/geometry3k", geometry3k.score),
    ],
)
def test_known_data_sources(data_source, rule):
    assert rule_for(data_source).score is rule


@pytest.mark.parametrize(
    ("data_source", "response", "answer"),
    [
        ("openai/gsm8k", "so #### 7 and then #### -1,200.50", "-1200.5"),
        ("openai/gsm8k", "1200", None),
        ("lighteval/MATH", r"first \boxed{2}, then \boxed{\frac12}", r"\frac{1}{2}"),
        ("hiyouga/geometry3k", r"<think></think>\boxed{30}", "30"),
        ("hiyouga/geometry3k", "30", None),
    ],
)
def test_what_a_response_answers(data_source, response, answer):
    assert rule_for(data_source).answer(response) == answer


@pytest.mark.parametrize(
    "data_source", ["gsm8k", "openai/GSM8K", "HuggingFaceH4/MATH", "x openai/gsm8k", "*"]
)
def test_unknown_data_sources_are_an_error_that_lists_the_known(data_source):
    with pytest.raises(UnknownDataSource) as caught:
        rule_for(data_source)
    message = str(caught.value)
    assert isinstance(caught.value, IIVerlError)
    assert caught.value.exit_code == 2
    assert repr(data_source) in message
    assert all(name in message for name in RULES)
    assert "custom_reward_function.path" in message


@pytest.mark.parametrize(
    ("data_source", "meant"),
    [
        ("openai/gsm-8k", "did you mean openai/gsm8k?"),
        ("OpenAI/GSM8K", "did you mean openai/gsm8k?"),
        ("lighteval/math", "did you mean lighteval/MATH?"),
        ("hiyouga/geometry-3k", "did you mean hiyouga/geometry3k?"),
    ],
)
def test_the_nearest_name_is_named(data_source, meant):
    with pytest.raises(UnknownDataSource) as caught:
        rule_for(data_source)
    assert meant in str(caught.value)


def test_a_name_that_is_near_to_none_names_no_nearest():
    with pytest.raises(UnknownDataSource) as caught:
        rule_for("acme/sonnets")
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("data_source", ["codecontests", "apps", "codeforces", "taco"])
def test_code_contests_are_sent_to_a_reward_server(data_source):
    with pytest.raises(UnknownDataSource, match=r"sandbox.*reward server.*code_verifiable"):
        rule_for(data_source)


def test_no_data_source_at_all_names_the_column():
    with pytest.raises(UnknownDataSource, match=r"there is no data_source.*Add the column data_source"):
        rule_for("")


def test_the_error_survives_the_way_between_processes():
    error = UnknownDataSource("acme/sonnets", where="rows.jsonl, row 3 (the first is 0)")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.data_source, copy.where) == (str(error), error.data_source, error.where)


def test_prompts_that_all_have_a_rule_and_a_truth_pass(make_sample):
    check_data_sources(
        [
            make_sample(ground_truth="72", key=(0, 0)).prompt,
            make_sample(ground_truth=0, key=(1, 0)).prompt,
            make_sample(ground_truth=r"\frac12", data_source="lighteval/MATH", key=(2, 0)).prompt,
            make_sample(ground_truth="48", data_source="hiyouga/geometry3k", key=(3, 0)).prompt,
        ]
    )


def test_the_first_row_without_a_rule_is_named(make_sample):
    prompts = [make_sample(ground_truth="72", key=(i, 0)).prompt for i in range(3)]
    prompts.append(make_sample(ground_truth="72", data_source="acme/sonnets", key=(17, 0)).prompt)
    with pytest.raises(UnknownDataSource, match=r"rows.jsonl, row 17 .*acme/sonnets.*Known: openai/gsm8k"):
        check_data_sources(prompts)


@pytest.mark.parametrize(
    ("data_source", "ground_truth", "message"),
    [
        ("openai/gsm8k", None, "there is no ground truth"),
        ("openai/gsm8k", "", "is a number such as 72, not ''"),
        ("openai/gsm8k", "seventy-two", "is a number such as 72, not 'seventy-two'"),
        ("lighteval/MATH", None, "there is no ground truth"),
        ("lighteval/MATH", "$ $", "ground truth of a MATH row"),
        ("hiyouga/geometry3k", "", "ground truth of a MATH row"),
    ],
)
def test_a_row_whose_truth_nothing_could_match_is_named(make_sample, data_source, ground_truth, message):
    good = make_sample(ground_truth="72", key=(4, 0)).prompt
    bad = make_sample(ground_truth=ground_truth, data_source=data_source, key=(5, 0)).prompt
    with pytest.raises(IIVerlError) as caught:
        check_data_sources([good, bad])
    assert "rows.jsonl, row 5 (the first is 0)" in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
