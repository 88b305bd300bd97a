"""Compute the metrics of a validation.

With N responses per prompt, for each data source:

| metric | mean over prompts of |
|---|---|
| `mean@N` | the mean score |
| `best@k` | the expected highest score of k of the responses, drawn without replacement; k = 2, 4, 8, … and N |
| `worst@N` | the lowest score |
| `maj@N` | the score of the most frequent answer |

`best@k` is exact: with the m scores of a prompt in ascending order, the i-th is the highest of k in C(i-1, k-1) of
C(m, k) draws. It is the unbiased pass@k of Chen et al. 2021 (arXiv:2107.03374, eq. 1), generalized to any scores.

A failed response has no score and is left out. Its prompt then has m < N scores, and `best@k` with k > m is the best of
these. So a prompt counts the same in every metric, `best@k` never falls with k, and failures can only make it smaller.
A prompt without scores is not counted.
"""

from collections import Counter
from collections.abc import Sequence
from math import comb

from iiverl_core.samples import Rollout
from iiverl_reward_client import Failed, Outcome, Scored

ANSWER = "pred"
"""The key of the answer that a scorer extracted, in `Scored.info` or `Scored.components`."""


def validation_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Describe the rollouts of a validation.

    `val/test_score/{data_source}` is the mean over all scored responses, and the metrics of several responses are below
    that name; the data source of a row without one is `unknown`. `maj@N` exists if the scorer extracts answers.
    `val/failed` counts responses whose scoring failed, even if a constant replaced the score.
    `val/response_length/mean` is in tokens, `clip_ratio` the fraction ended by the length limit.
    """
    metrics: dict[str, float] = {}
    for source, prompts in _by_data_source(rollouts).items():
        name = f"val/test_score/{source}"
        n = max(len(outcomes) for outcomes in prompts)
        scored = [kept for outcomes in prompts if (kept := [x for x in outcomes if isinstance(x, Scored)])]
        if not scored:
            continue
        metrics[name] = _mean([outcome.score for outcomes in scored for outcome in outcomes])
        if n > 1:
            metrics |= {f"{name}/{kind}": value for kind, value in _of_several(scored, n).items()}
    metrics["val/failed"] = float(sum(_has_failed(rollout.outcome) for rollout in rollouts))
    if rollouts:
        metrics["val/response_length/mean"] = _mean([rollout.response_length for rollout in rollouts])
        metrics["val/response_length/clip_ratio"] = _mean([r.finish_reason == "length" for r in rollouts])
    return metrics


def best_of(scores: Sequence[float], k: int) -> float:
    """Return the expected highest of k scores drawn without replacement; the highest of all if there are fewer."""
    m = len(scores)
    k = min(k, m)
    draws = comb(m, k)
    return sum(comb(i, k - 1) / draws * score for i, score in enumerate(sorted(scores)))


def majority(outcomes: Sequence[Scored]) -> float:
    """Return the mean score of the responses with the most frequent answer; in a tie, the first one.

    Responses without an answer have no vote, unless none has an answer.
    """
    answers = [_answer(outcome) for outcome in outcomes]
    votes = Counter([answer for answer in answers if answer is not None] or answers)
    winner = max(votes, key=lambda answer: votes[answer])
    return _mean([x.score for x, answer in zip(outcomes, answers, strict=True) if answer == winner])


def _by_data_source(rollouts: Sequence[Rollout]) -> dict[str, list[list[Outcome | None]]]:
    """Group the outcomes, ordered by member, by prompt and data source."""
    sources: dict[str, dict[int, list[Outcome | None]]] = {}
    for rollout in sorted(rollouts, key=lambda rollout: rollout.id.member):
        prompts = sources.setdefault(rollout.prompt.data_source or "unknown", {})
        prompts.setdefault(rollout.id.group, []).append(rollout.outcome)
    return {source: list(prompts.values()) for source, prompts in sorted(sources.items())}


def _of_several(prompts: Sequence[Sequence[Scored]], n: int) -> dict[str, float]:
    scores = [[outcome.score for outcome in outcomes] for outcomes in prompts]
    metrics = {f"mean@{n}": _mean([_mean(each) for each in scores])}
    for k in (*(2**i for i in range(1, n.bit_length()) if 2**i < n), n):
        metrics[f"best@{k}"] = _mean([best_of(each, k) for each in scores])
    metrics[f"worst@{n}"] = _mean([min(each) for each in scores])
    if any(_answer(outcome) is not None for outcomes in prompts for outcome in outcomes):
        metrics[f"maj@{n}"] = _mean([majority(outcomes) for outcomes in prompts])
    return metrics


def _answer(outcome: Scored) -> str | None:
    answer = outcome.info.get(ANSWER, outcome.components.get(ANSWER))
    return None if answer is None else str(answer).strip() or None


def _has_failed(outcome: Outcome | None) -> bool:
    return isinstance(outcome, Failed) or (isinstance(outcome, Scored) and "failed" in outcome.info)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
