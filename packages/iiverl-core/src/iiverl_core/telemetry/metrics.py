"""Compute the metrics of a step that need no worker, under the names that dashboards use."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from iiverl_core.registry import METRICS
from iiverl_core.samples import Rollout, SampleId
from iiverl_reward_client import Failed, Outcome, Scored

logger = logging.getLogger(__name__)

Stats: TypeAlias = tuple[float, float, float]
"""Mean, maximum and minimum."""

GIB = 1024**3
SCORE = "critic/score/mean"
"""The main metric of a run: the mean score, before any KL penalty."""


def batch_metrics(
    rollouts: Sequence[Rollout],
    *,
    max_prompt_length: int,
    rewards: Mapping[SampleId, float] | None = None,
    token_stats: Mapping[str, Stats] | None = None,
) -> dict[str, float]:
    """Describe the rollouts of a step: scores, rewards, failures and lengths.

    `rewards` holds the reward after KL of each scored rollout, by default the score. `token_stats` are the workers'
    statistics of per-token arrays (`advantages`, `returns`, `values`), logged as `critic/{name}/…`. `reward/failed`
    counts failed rollouts, which have no score; if all failed there is no `critic/score`. `clip_ratio` is the fraction
    of responses ended by the length limit, and of prompts of `max_prompt_length` tokens; `response/duplicates` that of
    responses whose text another one to the same prompt has, too. `critic/score/length_correlation` is Pearson's
    coefficient of the score and the response's tokens, if neither is always the same. Metrics of other packages come last.
    Rollouts of several turns also have `rollout/…`.
    """
    scored = {r.id: r.outcome for r in rollouts if isinstance(r.outcome, Scored)}
    scores = {id: outcome.score for id, outcome in scored.items()}
    metrics = _stats("critic/score", scores.values())
    metrics |= _stats("critic/rewards", (scores if rewards is None else rewards).values())
    for name, values in (token_stats or {}).items():
        metrics |= _named(f"critic/{name}", values)
    metrics |= _component_means(list(scored.values()))
    metrics |= _failures([kind for r in rollouts if (kind := _failure_kind(r.outcome))])
    metrics |= _stats("response_length", [r.response_length for r in rollouts])
    metrics |= _stats("prompt_length", [r.prompt_length for r in rollouts])
    if rollouts:
        metrics["response_length/clip_ratio"] = _fraction([r.finish_reason == "length" for r in rollouts])
        metrics["prompt_length/clip_ratio"] = _fraction(
            [r.prompt_length >= max_prompt_length for r in rollouts]
        )
        texts = Counter((r.id.group, r.raw_text) for r in rollouts)
        metrics["response/duplicates"] = _fraction([texts[r.id.group, r.raw_text] > 1 for r in rollouts])
    lengths = [r.response_length for r in rollouts if r.id in scores]
    if len(set(lengths)) > 1 and len(set(scores.values())) > 1:
        with np.errstate(over="ignore", invalid="ignore"):
            correlations = np.corrcoef(lengths, list(scores.values()))
        if np.isfinite(correlations).all():  # scores may be so large that their squares are not
            metrics["critic/score/length_correlation"] = float(correlations[0, 1])
    return metrics | _turns([r for r in rollouts if r.messages is not None]) | _external(rollouts)


def _turns(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Describe rollouts of several turns."""
    if not rollouts:
        return {}
    failed = [_failure_kind(r.outcome) == "environment" for r in rollouts]
    return {
        "rollout/turns": sum(len(r.turns) for r in rollouts) / len(rollouts),
        "rollout/env_failures": float(sum(failed)),
        "rollout/context_full": _fraction([r.finish_reason == "length" for r in rollouts]),
    } | {
        f"rollout/{name}": sum(r.counts.get(name, 0) for r in rollouts) / len(rollouts)
        for name in dict.fromkeys(name for r in rollouts for name in r.counts)
    }


def _external(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Compute the metrics of other packages; one that raises is skipped, since a metric must not end a run."""
    metrics: dict[str, float] = {}
    for metric in METRICS.external:
        try:
            value = metric.load()(rollouts)
        except Exception as error:
            logger.warning(
                "metric %s is skipped in this step: %s: %s", metric.name, type(error).__name__, error
            )
        else:
            metrics |= {} if value is None else {metric.name: float(value)}
    return metrics


def seqlen_metrics(lengths: Sequence[int], ranks: int, balanced: Sequence[float] = ()) -> dict[str, float]:
    """Describe how evenly tokens are spread over `ranks`: if each takes the next rollouts, and after balancing.

    `lengths` are the tokens of each rollout, prompt and response; `balanced` the tokens that each rank computes, shared
    prompts once, empty if there was no update. All values are tokens per rank.
    """
    cuts = [len(lengths) * rank // ranks for rank in range(ranks + 1)]
    before = [sum(lengths[a:b]) for a, b in pairwise(cuts)]
    metrics = {
        "global_seqlen/min": float(min(before)),
        "global_seqlen/max": float(max(before)),
        "global_seqlen/minmax_diff": float(max(before) - min(before)),
        "global_seqlen/mean": sum(lengths) / ranks,
    }
    if balanced:
        metrics["global_seqlen/balanced_min"] = float(min(balanced))
        metrics["global_seqlen/balanced_max"] = float(max(balanced))
    return metrics


def shared_fractions(tokens: int, computed: Mapping[str, float]) -> dict[str, float]:
    """Compute the fraction of a batch's `tokens` that its update saves by sharing prompts.

    `tokens` counts a prompt for each response to it; `computed` are those that an epoch computes, by model.
    """
    return {f"perf/shared_prompts/{model}": 1 - each / tokens for model, each in computed.items()}


def perf_metrics(
    *,
    total_tokens: int,
    step_seconds: float,
    devices: int,
    mfu: Mapping[str, float | None] | None = None,
    max_memory_allocated: int | None = None,
    max_memory_reserved: int | None = None,
    cpu_memory_used: int | None = None,
) -> dict[str, float]:
    """Describe the speed and memory of a step; values that are None are omitted.

    `total_tokens` counts prompts and responses; `perf/throughput` is tokens per second and device. `mfu` is by model
    (`actor`, `critic`). Memory is given in bytes (peak of the fullest device; used on the host) and logged in GiB,
    under names with `gb`.
    """
    known: dict[str, float | None] = {
        "perf/total_num_tokens": total_tokens,
        "perf/time_per_step": step_seconds,
        "perf/throughput": total_tokens / (step_seconds * devices) if step_seconds > 0 else None,
        "perf/max_memory_allocated_gb": None if max_memory_allocated is None else max_memory_allocated / GIB,
        "perf/max_memory_reserved_gb": None if max_memory_reserved is None else max_memory_reserved / GIB,
        "perf/cpu_memory_used_gb": None if cpu_memory_used is None else cpu_memory_used / GIB,
    }
    known |= {f"perf/mfu/{model}": share for model, share in (mfu or {}).items()}
    return {name: value for name, value in known.items() if value is not None}


def token_timings(
    timings: Mapping[str, float], *, response_tokens: int, total_tokens: int
) -> dict[str, float]:
    """Convert the `timing_s/…` of a step to milliseconds per token: response tokens for `gen`, all tokens otherwise."""
    per_token = {}
    for name in ("gen", "ref", "values", "adv", "update_critic", "update_actor"):
        tokens = response_tokens if name == "gen" else total_tokens
        if f"timing_s/{name}" in timings and tokens:
            per_token[f"timing_per_token_ms/{name}"] = timings[f"timing_s/{name}"] * 1000 / tokens
    return per_token


def _stats(name: str, values: Collection[float]) -> dict[str, float]:
    if not values:
        return {}
    return _named(name, (sum(values) / len(values), max(values), min(values)))


def _named(name: str, stats: Stats) -> dict[str, float]:
    return {f"{name}/{kind}": float(value) for kind, value in zip(("mean", "max", "min"), stats, strict=True)}


def _fraction(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags)


def _component_means(scored: Sequence[Scored]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for outcome in scored:
        for component, value in outcome.components.items():
            values.setdefault(component, []).append(value)
    return {f"reward/{component}/mean": sum(v) / len(v) for component, v in sorted(values.items())}


def _failure_kind(outcome: Outcome | None) -> str | None:
    """Return the failure kind, even if a constant replaced the score; None if scoring did not fail."""
    if isinstance(outcome, Failed):
        return outcome.kind
    return outcome.info.get("failed") if isinstance(outcome, Scored) else None


def _failures(kinds: Sequence[str]) -> dict[str, float]:
    counts = Counter(kinds)
    return {"reward/failed": float(len(kinds))} | {
        f"reward/failed/{k}": float(n) for k, n in sorted(counts.items())
    }
