"""Which scorer a configuration asks for."""

import pytest

from iiverl_core.config import build, run_config
from iiverl_core.rewards import check_prompts, make_scorer
from iiverl_core.rewards.rules import UnknownDataSource
from iiverl_reward_client import Failed, Scored
from rollouts import id_of


@pytest.fixture
def own_function(tmp_path):
    """A configuration with a function of the user's own."""
    file = tmp_path / "own_reward.py"
    file.write_text(
        "def judge(data_source, solution_str, ground_truth, extra_info, worth): return worth * len(solution_str)"
    )
    function = {"path": str(file), "name": "judge", "reward_kwargs": {"worth": 2}}
    return run_config(build({"custom_reward_function": function}))


def scores(config, *samples):
    scorer = make_scorer(config)
    try:
        for sample in samples:
            scorer.submit(sample)
        return scorer.collect([sample.id for sample in samples])
    finally:
        scorer.close()


def test_without_a_function_the_rules_score_by_data_source(make_sample):
    outcomes = scores(
        run_config(build({})),
        make_sample("#### 72", "72", key=(0, 0)),
        make_sample(r"\boxed{72}", "72", key=(0, 1)),
        make_sample(r"\boxed{1/2}", r"\frac12", "lighteval/MATH", key=(1, 0)),
    )
    assert outcomes == {
        id_of(0, 0): Scored(1.0, info={"pred": "72"}),
        id_of(0, 1): Scored(0.0),
        id_of(1, 0): Scored(1.0, info={"pred": r"\frac{1}{2}"}),
    }


def test_a_row_that_its_rule_cannot_score_fails_and_is_named(make_sample):
    outcome = scores(run_config(build({})), make_sample("#### 72", "none", key=(6, 0)))[id_of(6, 0)]
    assert isinstance(outcome, Failed)
    assert "rows.jsonl, row 6 (the first is 0)" in outcome.detail


def test_a_data_source_without_a_rule_never_scores_zero(make_sample):
    with pytest.raises(UnknownDataSource):
        scores(run_config(build({})), make_sample("#### 72", "72", "acme/sonnets"))


def test_the_users_function_scores_every_data_source(own_function, make_sample):
    assert scores(own_function, make_sample("abc", data_source="acme/sonnets")) == {id_of(0, 0): Scored(6.0)}


def test_only_the_rules_ask_for_a_data_source_before_the_run(own_function, make_sample):
    prompts = [make_sample(data_source="acme/sonnets").prompt]
    check_prompts(own_function, prompts)
    with pytest.raises(UnknownDataSource):
        check_prompts(run_config(build({})), prompts)
