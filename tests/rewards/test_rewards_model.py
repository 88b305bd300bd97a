"""A reward model alone and beside another scorer: order, sums, failures, and what is refused."""

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iiverl_core.rewards import FunctionScorer, ModelScorer, RewardModelInput, Scorer
from iiverl_core.samples import Rollout, SampleId, SequenceRef, TokenSequence
from iiverl_reward_client import Failed, Outcome, Scored
from rollouts import id_of

pytestmark = pytest.mark.timeout(20)

Make = Callable[..., Rollout]


class Model:
    """Scores a sequence by its tokens, or by their number, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[dict[SampleId, RewardModelInput]] = []

    def __call__(self, sequences: Mapping[SampleId, RewardModelInput]) -> list[float]:
        self.calls.append(dict(sequences))
        return [
            float(each.length if isinstance(each, SequenceRef) else each.token_ids.sum())
            for each in sequences.values()
        ]


@pytest.fixture
def scorer_of() -> Iterator[Callable[..., ModelScorer]]:
    """Makes a scorer, and closes it after the test."""
    scorers: list[Scorer] = []

    def make(score, **options) -> ModelScorer:
        scorers.append(ModelScorer(score, **options))
        return scorers[-1]

    yield make
    for scorer in scorers:
        scorer.close()


def collected(scorer: Scorer, *samples: Rollout) -> dict[SampleId, Outcome]:
    for sample in samples:
        scorer.submit(sample)
    return dict(scorer.collect([sample.id for sample in samples]))


def by_text(sample: Rollout) -> Outcome:
    """A user's function: the response is a number, or says that there is none."""
    if sample.text == "no":
        return Failed("function", detail="no number")
    return Scored(float(sample.text), {"format": 0.5}, {"why": "said so"})


def test_the_model_is_asked_once_for_all_in_the_order_of_group_and_member(scorer_of, make_sample: Make):
    model = Model()
    keys = [(2, 0), (0, 1), (10, 0), (0, 0), (1, 1)]
    outcomes = collected(scorer_of(model), *(make_sample("x" * sum(key), key=key) for key in keys))
    (asked,) = model.calls
    assert list(asked) == [id_of(*key) for key in sorted(keys)]
    # The prompt has three tokens, and a response has as many tokens as letters.
    assert outcomes == {id_of(*key): Scored(3.0 + sum(key), {"reward_model": 3.0 + sum(key)}) for key in keys}


def test_each_collect_is_about_what_it_asks_for(scorer_of, make_sample: Make):
    model = Model()
    scorer = scorer_of(model)
    assert scorer.collect([]) == {}
    assert model.calls == []  # the workers are left alone
    assert scorer.busy_seconds == 0
    first = collected(scorer, make_sample("a"))
    assert first == {id_of(0, 0): Scored(4.0, {"reward_model": 4.0})}
    assert collected(scorer, make_sample("bb")) == {id_of(0, 0): Scored(5.0, {"reward_model": 5.0})}
    for group in range(2):
        scorer.submit(make_sample("c" * (group + 3), key=(group, 0)))
    assert list(scorer.collect([id_of(1, 0)])) == [id_of(1, 0)]
    assert list(scorer.collect([id_of(0, 0)])) == [id_of(0, 0)]
    assert len(model.calls) == 4


def test_the_model_reads_what_was_rewritten_and_the_other_scorer_the_rollouts(scorer_of, make_sample: Make):
    model, judged, threads = Model(), [], []

    def rewrite(rollout: Rollout) -> TokenSequence:
        threads.append(threading.get_ident())
        return TokenSequence.untrained([100, 200])

    def judge(rollout: Rollout) -> Outcome:
        judged.append(rollout)
        return Scored(0.0)

    rollout = make_sample("abc")
    outcomes = collected(scorer_of(model, rewrite=rewrite, other=FunctionScorer(judge)), rollout)
    assert outcomes[id_of(0, 0)] == Scored(300.0, {"reward_model": 300.0, "other": 0.0})
    assert judged == [rollout]
    assert threading.get_ident() not in threads


def test_a_sample_that_cannot_be_shown_to_the_model_fails_alone(scorer_of, make_sample: Make):
    model = Model()
    failure = Failed("function", detail="too long")
    scorer = scorer_of(
        model, rewrite=lambda sample: failure if sample.id.group == 1 else sample.sequences[-1]
    )
    outcomes = collected(scorer, *(make_sample(key=(group, 0)) for group in range(3)))
    score = Scored(3.0, {"reward_model": 3.0})
    assert outcomes == {id_of(0, 0): score, id_of(1, 0): failure, id_of(2, 0): score}
    assert list(model.calls[0]) == [id_of(0, 0), id_of(2, 0)]
    assert collected(scorer, make_sample(key=(1, 0))) == {id_of(1, 0): failure}
    assert len(model.calls) == 1


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_no_score(scorer_of, make_sample: Make, score: float):
    scorer = scorer_of(lambda samples: [score, 1.0])
    bad, good = collected(scorer, make_sample(), make_sample(key=(0, 1))).values()
    assert isinstance(bad, Failed)
    assert bad.kind == "bad_response"
    assert f"the score is {score}" in bad.detail
    assert good == Scored(1.0, {"reward_model": 1.0})


def test_scores_of_both_are_added_and_told_apart(scorer_of, make_sample: Make):
    scorer = scorer_of(Model(), other=FunctionScorer(by_text), other_name="custom_reward_function")
    outcome = collected(scorer, make_sample("0.25"))[id_of()]
    parts = {"format": 0.5, "custom_reward_function": 0.25, "reward_model": 7.0}
    assert outcome == Scored(7.25, parts, {"why": "said so"})


def test_what_either_could_not_score_has_no_score(scorer_of, make_sample: Make):
    scorer = scorer_of(
        lambda samples: [math.nan if id.group == 1 else 1.0 for id in samples],
        other=FunctionScorer(by_text),
    )
    texts = ["no", "5", "7"]
    outcomes = collected(scorer, *(make_sample(text, key=(i, 0)) for i, text in enumerate(texts)))
    assert outcomes[id_of(0, 0)] == Failed("function", detail="no number")
    assert isinstance(outcomes[id_of(1, 0)], Failed)
    assert outcomes[id_of(1, 0)].kind == "bad_response"
    assert outcomes[id_of(2, 0)] == Scored(
        8.0, {"format": 0.5, "other": 7.0, "reward_model": 1.0}, {"why": "said so"}
    )


def test_a_sum_beyond_the_finite_is_a_failure(scorer_of, make_sample: Make):
    scorer = scorer_of(lambda samples: [1.7e308], other=FunctionScorer(lambda sample: Scored(1.7e308)))
    assert isinstance(collected(scorer, make_sample())[id_of()], Failed)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # it gives a plain function
@given(
    values=st.dictionaries(
        st.tuples(st.integers(0, 5), st.integers(0, 5)),
        st.tuples(st.floats(), st.floats(-1e9, 1e9) | st.none()),
        max_size=8,
    ),
    order=st.randoms(use_true_random=False),
)
def test_every_sample_has_one_outcome_and_only_finite_sums_are_scores(make_sample: Make, values, order):
    def judge(sample: Rollout) -> Outcome:
        said = values[sample.id.group, sample.id.member][1]
        return Failed("function") if said is None else Scored(said)

    scorer = ModelScorer(
        lambda samples: [values[id.group, id.member][0] for id in samples],
        other=FunctionScorer(judge),
    )
    keys = list(values)
    order.shuffle(keys)
    outcomes = collected(scorer, *(make_sample(key=key) for key in keys))
    scorer.close()
    assert set(outcomes) == {id_of(*key) for key in values}
    for key, (by_model, by_other) in values.items():
        if by_other is not None and math.isfinite(by_model + by_other):
            parts = {"other": by_other, "reward_model": by_model}
            assert outcomes[id_of(*key)] == Scored(by_model + by_other, parts)
        else:
            assert isinstance(outcomes[id_of(*key)], Failed)


def test_a_sample_that_comes_twice_is_refused(scorer_of, make_sample: Make):
    scorer = scorer_of(Model(), other=FunctionScorer(by_text))
    scorer.submit(make_sample("1", key=(3, 1)))
    with pytest.raises(ValueError, match="group 3, member 1 was submitted twice"):
        scorer.submit(make_sample("1", key=(3, 1)))
    assert list(scorer.collect([id_of(3, 1)])) == [id_of(3, 1)]
    scorer.submit(make_sample("1", key=(3, 1)))  # a new step


def test_faults_of_the_program_surface_in_collect(scorer_of, make_sample: Make):
    with pytest.raises(RuntimeError, match="returned 1 scores for 2 sequences"):
        collected(scorer_of(lambda samples: [1.0]), make_sample(), make_sample(key=(0, 1)))
    with pytest.raises(ZeroDivisionError):
        collected(scorer_of(lambda samples: [1 / 0]), make_sample())
    with pytest.raises(ZeroDivisionError):
        collected(scorer_of(Model(), rewrite=lambda sample: 1 / 0), make_sample())
    with pytest.raises(ZeroDivisionError):
        collected(scorer_of(Model(), other=FunctionScorer(lambda sample: 1 / 0)), make_sample())


def test_closed_means_closed_for_both(make_sample: Make):
    other = FunctionScorer(by_text)
    scorer = ModelScorer(Model(), other=other)
    scorer.submit(make_sample("1"))
    scorer.close()
    scorer.close()  # twice does no harm
    for closed in (scorer, other):
        with pytest.raises(RuntimeError, match="closed"):
            closed.submit(make_sample("1", key=(1, 0)))
        with pytest.raises(RuntimeError, match="closed"):
            closed.collect([id_of(1, 0)])


def test_the_other_scorer_works_while_the_model_does_and_time_counts_once(scorer_of, make_sample: Make):
    running = threading.Event()

    def judge(sample: Rollout) -> Outcome:
        running.set()
        time.sleep(0.3)
        return Scored(0.0)

    def score(samples: Mapping[SampleId, RewardModelInput]) -> list[float]:
        assert running.wait(10)
        time.sleep(0.3)
        return [0.0 for _ in samples]

    scorer = scorer_of(score, other=FunctionScorer(judge))
    began = time.monotonic()
    collected(scorer, make_sample())
    elapsed = time.monotonic() - began
    assert elapsed < 0.55
    assert 0.3 <= scorer.busy_seconds <= elapsed


def test_what_the_other_did_before_counts_as_well(scorer_of, make_sample: Make):
    scored = threading.Event()

    def judge(sample: Rollout) -> Outcome:
        time.sleep(0.1)
        scored.set()
        return Scored(0.0)

    scorer = scorer_of(lambda samples: time.sleep(0.1) or [0.0], other=FunctionScorer(judge))
    scorer.submit(make_sample())
    assert scored.wait(10)
    time.sleep(0.2)  # idle
    scorer.collect([id_of()])
    assert 0.2 <= scorer.busy_seconds < 0.35
