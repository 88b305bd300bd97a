"""Responses that are interrupted go on: as if nothing had happened, or with the newer weights that came meanwhile."""

import numpy as np
import pytest
from test_rollout_rollouter import ENDS, PARAMS, TwoTurns, requests
from test_rollout_vllm import moved

from iiverl_core.rollout import (
    RolloutRunner,
    SamplingParams,
    generate,
    run_rollouts,
)
from rollout.responses import by_id, check_spans, interrupted, members

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.9, max_tokens=20)
TRUNCATED = SamplingParams(temperature=0.8, top_k=9, top_p=0.9, max_tokens=20)

__all__ = ["moved"]  # the fixture


@pytest.mark.parametrize("name", ["qwen2", "gemma3_text", "bloom"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED, TRUNCATED])
def test_with_the_same_weights_it_is_the_same_response(
    name, params, make_model, make_engine_of, prompts
) -> None:
    engine = make_engine_of(*make_model(name), override_config=ENDS, max_sequences=7)
    asked = members(prompts, 3)
    whole = by_id(list(generate(engine, asked, params)))
    parts = by_id(interrupted(engine, asked, params))
    for id, expected in whole.items():
        done = parts[id]
        assert done.token_ids.tolist() == expected.token_ids.tolist()
        assert done.finish_reason == expected.finish_reason
        np.testing.assert_allclose(done.log_probs, expected.log_probs, atol=1e-5)
        assert done.spans == expected.spans == ((0, len(done.token_ids)),)
        assert (done.kept is None) == (expected.kept is None)
        if done.kept is not None:
            assert done.kept.ids.tolist() == expected.kept.ids.tolist()
            assert done.kept.counts.tolist() == expected.kept.counts.tolist()


def test_each_token_has_the_log_prob_of_the_weights_that_wrote_it(
    make_model, make_engine_of, moved, prompts, teacher_forced
) -> None:
    path, model = make_model("qwen2")
    models = [model, moved(model, 1), moved(model, 2)]
    engine = make_engine_of(path, model, override_config=ENDS)
    check_spans(engine, models, SAMPLED, prompts, teacher_forced, ENDS["eos_token_id"])


@pytest.fixture
def engine(make_model, make_engine_of):
    return make_engine_of(*make_model("qwen2"), override_config=ENDS)


def test_rollouts_of_several_turns_wait_where_they_are(engine) -> None:
    asked = requests(4, 3)
    expected = {each.id: each for each in run_rollouts(engine, TwoTurns(), asked, PARAMS)}
    runner, done, looks = RolloutRunner(engine, TwoTurns(), PARAMS), {}, 0

    def fourth_look() -> bool:
        nonlocal looks
        looks += 1
        return looks % 4 == 0

    while len(done) < len(asked):
        missing = [each for each in asked if each.id not in done]
        done |= {each.id: each for each in runner.run(missing, fourth_look)}
        assert runner.unfinished == len(asked) - len(done)
        assert engine.pending == 0
    runner.close()
    assert looks > 12
    for id, each in done.items():
        (sequence,), (whole,) = each.sequences, expected[id].sequences
        assert sequence.token_ids.tolist() == whole.token_ids.tolist()
        np.testing.assert_allclose(sequence.log_probs, whole.log_probs, atol=1e-5)
        assert each.spans == ()


def test_a_rollout_tells_which_weights_wrote_which_of_its_tokens(engine, make_model, moved) -> None:
    asked, model = requests(2, 2), make_model("qwen2")[1]
    rollouter, version = TwoTurns(), 0
    runner, done = RolloutRunner(engine, rollouter, PARAMS), []
    while len(done) < len(asked):
        looks, finished = iter((False,) * 5), {each.id for each in done}
        missing = [each for each in asked if each.id not in finished]
        done += list(runner.run(missing, lambda looks=looks: next(looks, True)))
        version += 1
        engine.update_weights(moved(model, version).named_parameters(), version)
    runner.close()
    assert any(len(each.spans) > 2 for each in done)
    for each in done:
        trained = sum(sequence.trained for sequence in each.sequences)
        if each.spans:
            assert sum(span.tokens for span in each.spans) == trained
            assert [span.version for span in each.spans] == sorted({span.version for span in each.spans})
            assert each.weights_version == each.spans[-1].version


def test_rollouts_that_are_not_asked_for_again_are_cancelled(engine) -> None:
    asked = requests(3, 2)
    runner = RolloutRunner(engine, TwoTurns(), PARAMS)
    looks = iter((False, False))
    assert not list(runner.run(asked, lambda: next(looks, True)))
    done = list(runner.run(asked[2:]))
    assert {each.id for each in done} == {each.id for each in asked[2:]}
    assert (runner.unfinished, engine.pending) == (0, 0)
    runner.close()
