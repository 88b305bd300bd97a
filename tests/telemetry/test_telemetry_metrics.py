from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.samples import Rollout, SampledTurn
from iiverl_core.telemetry.metrics import (
    batch_metrics,
    perf_metrics,
    seqlen_metrics,
    shared_fractions,
    token_timings,
)
from iiverl_reward_client import Failed, Scored
from rollouts import id_of, make_rollout

Make = Callable[..., Rollout]


def test_scores_are_of_scored_samples_only(make_sample: Make):
    samples = [
        make_sample(0, 0, outcome=Scored(1.0, {"format": 1.0, "answer": 0.0})),
        make_sample(0, 1, outcome=Scored(0.25, {"format": 0.5})),
        make_sample(1, 0, outcome=Failed("timeout")),
        make_sample(1, 1, outcome=Failed("server", attempts=3)),
        make_sample(1, 2, outcome=Failed("timeout")),
    ]
    metrics = batch_metrics(samples, max_prompt_length=16, rewards={id_of(0, 0): 0.5, id_of(0, 1): 0.0})
    assert metrics["critic/score/mean"] == 0.625
    assert (metrics["critic/score/max"], metrics["critic/score/min"]) == (1.0, 0.25)
    assert metrics["critic/rewards/mean"] == 0.25
    assert (metrics["critic/rewards/max"], metrics["critic/rewards/min"]) == (0.5, 0.0)
    assert {name: value for name, value in metrics.items() if name.startswith("reward/")} == {
        "reward/answer/mean": 0.0,
        "reward/format/mean": 0.75,
        "reward/failed": 3.0,
        "reward/failed/server": 1.0,
        "reward/failed/timeout": 2.0,
    }


def test_lengths_and_clip_ratios(make_sample: Make):
    samples = [
        make_sample(0, 0, prompt=2, response=8, finish="length"),
        make_sample(0, 1, prompt=2, response=1),
        make_sample(1, 0, prompt=4, response=3),
        make_sample(1, 1, prompt=4, response=8),  # as long as the limit, and still ended by itself
    ]
    metrics = batch_metrics(samples, max_prompt_length=4)
    assert {name: value for name, value in metrics.items() if "length" in name} == {
        "response_length/mean": 5.0,
        "response_length/max": 8.0,
        "response_length/min": 1.0,
        "response_length/clip_ratio": 0.25,
        "prompt_length/mean": 3.0,
        "prompt_length/max": 4.0,
        "prompt_length/min": 2.0,
        "prompt_length/clip_ratio": 0.5,
    }


def test_equal_responses_and_scores_that_follow_length(make_sample: Make):
    samples = [
        replace(make_sample(group, member, response=length, outcome=Scored(score)), raw_text=text)
        for group, member, length, score, text in [
            (0, 0, 1, 0.0, "a"),
            (0, 1, 2, 0.5, "a"),
            (0, 2, 3, 1.0, "b"),
            (1, 0, 4, 1.5, "b"),  # of another prompt
        ]
    ]
    metrics = batch_metrics(samples, max_prompt_length=4)
    assert metrics["response/duplicates"] == 0.5
    assert metrics["critic/score/length_correlation"] == pytest.approx(1.0)
    shorter = [replace(each, outcome=Scored(-each.outcome.score)) for each in samples]
    assert batch_metrics(shorter, max_prompt_length=4)["critic/score/length_correlation"] == pytest.approx(-1)
    huge = [replace(each, outcome=Scored(1e300 * each.outcome.score)) for each in samples]
    for others in (samples[:1], [replace(each, outcome=Scored(1.0)) for each in samples], huge):
        assert "critic/score/length_correlation" not in batch_metrics(others, max_prompt_length=4)


def test_stats_of_workers_are_passed_on_and_rewards_default_to_scores(make_sample: Make):
    metrics = batch_metrics(
        [make_sample(outcome=Scored(2.0))],
        max_prompt_length=4,
        token_stats={"advantages": (0.5, 2.0, -1.0), "values": (1.0, 1.0, 1.0)},
    )
    assert metrics["critic/rewards/mean"] == 2.0
    assert metrics["critic/advantages/mean"] == 0.5
    assert metrics["critic/advantages/max"] == 2.0
    assert metrics["critic/advantages/min"] == -1.0
    assert metrics["critic/values/mean"] == 1.0
    assert not any(name.startswith("critic/returns") for name in metrics)


def test_where_nothing_was_scored_there_is_no_score(make_sample: Make):
    metrics = batch_metrics([make_sample(outcome=Failed("transport"))], max_prompt_length=4, rewards={})
    assert not any(name.startswith(("critic/score", "critic/rewards")) for name in metrics)
    assert metrics["reward/failed"] == 1.0
    assert batch_metrics([], max_prompt_length=4) == {"reward/failed": 0.0}


def test_seqlen_before_and_after_balancing():
    metrics = seqlen_metrics([10, 20, 1, 3], 2, [13, 21])
    assert metrics == {
        "global_seqlen/min": 4.0,
        "global_seqlen/max": 30.0,
        "global_seqlen/minmax_diff": 26.0,
        "global_seqlen/balanced_min": 13.0,
        "global_seqlen/balanced_max": 21.0,
        "global_seqlen/mean": 17.0,
    }


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=40), st.integers(1, 8))
def test_without_an_update_only_the_lengths_before_balancing_are_known(lengths: list[int], n: int):
    cuts = [len(lengths) * rank // n for rank in range(n + 1)]
    metrics = seqlen_metrics(lengths, n)
    ranks = [sum(lengths[cuts[r] : cuts[r + 1]]) for r in range(n)]
    assert metrics["global_seqlen/min"] == min(ranks)
    assert metrics["global_seqlen/max"] == max(ranks)
    assert not any("balanced" in name for name in metrics)  # nothing was balanced without an update
    assert metrics["global_seqlen/min"] <= metrics["global_seqlen/mean"] <= metrics["global_seqlen/max"]


def test_the_fraction_that_sharing_saves():
    """Four responses of 100 tokens to one prompt of 100 tokens: 800 tokens, of which 500 are computed."""
    assert shared_fractions(800, {"actor": 500.0, "critic": 800.0}) == {
        "perf/shared_prompts/actor": 0.375,
        "perf/shared_prompts/critic": 0.0,
    }


def test_perf_holds_what_is_known():
    metrics = perf_metrics(
        total_tokens=6000,
        step_seconds=2.0,
        devices=3,
        mfu={"actor": 0.4, "critic": None},
        max_memory_allocated=3 * 1024**3,
        cpu_memory_used=1024**3 // 2,
    )
    assert metrics == {
        "perf/total_num_tokens": 6000,
        "perf/time_per_step": 2.0,
        "perf/throughput": 1000.0,
        "perf/max_memory_allocated_gb": 3.0,
        "perf/cpu_memory_used_gb": 0.5,
        "perf/mfu/actor": 0.4,
    }


def test_generation_is_timed_by_response_tokens_and_the_rest_by_all():
    timings = {
        "timing_s/gen": 2.0,
        "timing_s/update_actor": 3.0,
        "timing_s/reward": 1.0,
        "timing_s/step": 9.0,
    }
    assert token_timings(timings, response_tokens=500, total_tokens=1000) == {
        "timing_per_token_ms/gen": pytest.approx(4.0),
        "timing_per_token_ms/update_actor": pytest.approx(3.0),
    }
    assert token_timings(timings, response_tokens=0, total_tokens=0) == {}


def test_rollouts_of_several_turns_have_metrics_of_their_own():
    turn = SampledTurn(1, 2)
    rollouts = [
        make_rollout(0, messages=(), turns=(turn, turn, turn), outcome=Scored(1.0)),
        make_rollout(1, messages=(), turns=(turn,), outcome=Scored(1.0), finish_reason="length"),
        make_rollout(2, messages=(), outcome=Failed("environment")),
        make_rollout(3, messages=(), outcome=Scored(0.0, info={"failed": "environment"})),
    ]
    metrics = batch_metrics(rollouts, max_prompt_length=8)
    assert {name: value for name, value in metrics.items() if name.startswith("rollout/")} == {
        "rollout/turns": 1.0,
        "rollout/env_failures": 2.0,
        "rollout/context_full": 0.25,
    }
    assert metrics["reward/failed/environment"] == 2
    assert not any(
        name.startswith("rollout/") for name in batch_metrics([make_rollout()], max_prompt_length=8)
    )
