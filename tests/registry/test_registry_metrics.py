"""The table of metrics: which names a pattern stands for."""

import pytest

from iiverl_core.registry.metrics import METRICS, describe


@pytest.mark.parametrize(
    ("name", "described_by"),
    [
        ("critic/score/min", "critic/score/{mean,max,min}"),
        ("critic/score/median", None),
        ("reward/failed/timeout", "reward/failed/{kind}"),
        ("reward/reward_model/mean", "reward/{component}/mean"),
        ("global_seqlen/balanced_max", "global_seqlen/balanced_{min,max}"),
        ("perf/max_memory_reserved_gb", "perf/max_memory_{allocated,reserved}_gb"),
        ("val/test_score/openai/gsm8k", "val/test_score/{data_source}"),
        ("val/test_score/openai/gsm8k/best@16", "val/test_score/{data_source}/best@{k}"),
        ("actor/pg_loss", "actor/pg_loss"),
        ("actor/lr", "{actor,critic}/lr"),
        ("actor/of_a_users_loss", "actor/{name}"),
        ("timing_s/unheard", None),
        ("xactor/pg_loss", None),
    ],
)
def test_a_name_is_described_by_its_pattern(name: str, described_by: str | None) -> None:
    found = describe(name)
    assert (found and found.name) == described_by


def test_units_are_those_of_the_documentation() -> None:
    assert {metric.unit for metric in METRICS.values()} <= {
        "", "score", "score²", "nats", "nats/token", "fraction", "ratio", "responses", "turns", "calls", "rollouts", "groups",
        "batches", "mini-batches", "steps", "tokens", "engines",
        "tokens/s/device", "GiB", "s", "ms/token",
    }  # fmt: skip
