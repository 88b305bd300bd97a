"""Find what often goes wrong in a run, in its metrics, and say which key to look at.

The limits are those from which on practitioners look at a run by hand; none of them is a proof.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from iiverl_core.telemetry.history import is_finite_number
from iiverl_core.telemetry.metrics import SCORE

MIN_STEPS = 10
"""Fewer steps say nothing."""

Column = Callable[[str], list[float]]


@dataclass(frozen=True)
class Finding:
    """What was seen in the last steps, what to do about it, and the metric that shows it."""

    text: str
    advice: str
    metric: str


def find_problems(history: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Look at the last tenth of the training steps, at least at five, beside the first tenth."""
    trained = [record for record in history if record["step"] > 0]
    if len(trained) < MIN_STEPS:
        return []
    size = max(5, len(trained) // 10)

    def column(records: Sequence[Mapping[str, Any]]) -> Column:
        return lambda name: [each[name] for each in records if is_finite_number(each.get(name))]

    first, last, whole = column(trained[:size]), column(trained[-size:]), column(trained)
    checks = (
        *(_equal_rewards, _cut_off, _duplicates, _length, _entropy, _kl, _mismatch, _failures, _skipped),
        *(_waiting, _retired),
    )
    return [finding for check in checks for finding in check(first, last, whole)]


def _equal_rewards(first: Column, last: Column, whole: Column) -> Iterator[Finding]:
    high, low = last("critic/advantages/max"), last("critic/advantages/min")
    idle = [top == bottom == 0 for top, bottom in zip(high, low, strict=False)]
    if idle and fmean(idle) > 0.5:
        yield Finding(
            f"All advantages are 0 in {sum(idle)} of the last {len(idle)} steps: the responses to each prompt score "
            "the same, and nothing is learned.",
            "Prompts are too easy or too hard. Look at the samples; raise rollout.n, choose other prompts, or drop such "
            "groups with algorithm.filter_groups.",
            "critic/advantages/max",
        )


def _cut_off(first: Column, last: Column, whole: Column) -> Iterator[Finding]:
    cut = last("response_length/clip_ratio")
    if cut and fmean(cut) > 0.3:
        yield Finding(
            f"{fmean(cut):.0%} of the responses are cut off at the length limit.",
            "They can hardly be right. Raise data.max_response_length, or check that the model ends its responses: its "
            "chat template and its end-of-sequence tokens.",
            "response_length/clip_ratio",
        )


def _below_best(last: Column, whole: Column) -> bool:
    """Whether the reward is well below its best: a policy that has learned a task is sure of itself for a good reason."""
    scores = whole(SCORE)
    best = max(scores) - min(scores)
    return best <= 0 or fmean(last(SCORE)) < max(scores) - 0.3 * best


def _duplicates(first: Column, last: Column, whole: Column) -> Iterator[Finding]:
    equal = last("response/duplicates")
    if equal and last(SCORE) and fmean(equal) > 0.5 and _below_best(last, whole):
        yield Finding(
            f"{fmean(equal):.0%} of the responses equal another one to the same prompt, and the reward is below its best.",
            "Equal responses teach nothing. Raise rollout.temperature, lower actor.optim.lr, or look for a reward that one "
            "answer to everything satisfies.",
            "response/duplicates",
        )


def _length(first: Column, last: Column, whole: Column) -> Iterator[Finding]:
    correlation, before, now = (
        last("critic/score/length_correlation"),
        first("response_length/mean"),
        last("response_length/mean"),
    )
    if correlation and before and now and fmean(correlation) > 0.5 and fmean(now) > 1.3 * fmean(before):
        yield Finding(
            f"The reward follows the length of responses (correlation {fmean(correlation):.2f}), which has grown from "
            f"{fmean(before):.0f} to {fmean(now):.0f} tokens.",
            "The policy may have learned to write more, and nothing else. Read long samples; reward_model.overlong_buffer "
            "charges for length.",
            "critic/score/length_correlation",
        )


def _entropy(first: Column, last: Column, whole: Column) -> Iterator[Finding]:
    entropy, scores = whole("actor/entropy_loss"), whole(SCORE)
    before, now = first("actor/entropy_loss"), last("actor/entropy_loss")
    if not before or not now or len(scores) < MIN_STEPS:
        return
    stuck = _below_best(last, whole)
    if fmean(now) < 0.1 * fmean(before) and fmean(before) > 0 and stuck:
        yield Finding(
            f"The entropy has fallen from {fmean(before):.3g} to {fmean(now):.3g}, and the reward is below its best.",
            "The policy tries nothing new. Lower actor.optim.lr, set actor.clip_ratio_high above clip_ratio, or add "
            "actor.entropy_coeff.",
            "actor/entropy_loss",
        )
    if fmean(now) > 3 * fmean(before) and fmean(now) > 0.5 and len(entropy) >= MIN_STEPS and stuck:
        yield Finding(
            f"The entropy has grown from {fmean(before):.3g} to {fmean(now):.3g}, and the reward is below its best.",
            "The policy is losing its form. Lower actor.optim.lr or actor.entropy_coeff.",
            "actor/entropy_loss",
        )


def _kl(first: Column, last: Column, whole: Column) -> Iterator[Finding]:
    for name, where in (("critic/kl", "algorithm.kl_ctrl.kl_coef"), ("actor/kl_loss", "actor.kl_loss_coef")):
        values = whole(name)
        if len(values) < MIN_STEPS:
            continue
        usual, now = median(values[: len(values) // 2]), fmean(last(name))
        if now > 1.0 and now > 10 * max(usual, 0.01):
            yield Finding(
                f"The KL divergence from the reference has grown from {usual:.3g} to {now:.3g}.",
                f"The policy leaves the reference quickly: lower actor.optim.lr, or raise {where}.",
                name,
            )
    step_kl = last("actor/ppo_kl")
    if step_kl and fmean(step_kl) > 0.1:
        yield Finding(
            f"The policy moves by a KL divergence of {fmean(step_kl):.3g} within a step.",
            "Lower actor.optim.lr or actor.ppo_epochs, or raise actor.ppo_mini_batch_size.",
            "actor/ppo_kl",
        )


def _mismatch(first: Column, last: Column, whole: Column) -> Iterator[Finding]:
    kl = last("rollout/kl")
    if any(last("staleness/max")):
        return  # it is also the distance between two versions of the policy
    if kl and fmean(kl) > 0.01:
        yield Finding(
            f"The engine's probabilities differ from the trainer's by a KL divergence of {fmean(kl):.3g}.",
            "Responses come from another policy than the one that is trained: correct for it with "
            "algorithm.rollout_correction, or compute in the same dtype (rollout.dtype).",
            "rollout/kl",
        )


def _failures(first: Column, last: Column, whole: Column) -> Iterator[Finding]:
    failed, sizes = sum(whole("reward/failed")), len(whole("reward/failed"))
    if failed:
        yield Finding(
            f"{failed:.0f} responses of {sizes} steps could not be scored, and were not trained on.",
            "Look at the samples that failed, and at their reasons.",
            "reward/failed",
        )


def _skipped(first: Column, last: Column, whole: Column) -> Iterator[Finding]:
    skipped = whole("actor/skipped_updates")
    if any(skipped):
        yield Finding(
            f"In {sum(map(bool, skipped))} of {len(skipped)} steps an update was left out, since its gradient was not "
            "finite.",
            "Lower actor.optim.lr or actor.grad_clip; in half precision, look for very large log-probs.",
            "actor/skipped_updates",
        )


def _waiting(first: Column, last: Column, whole: Column) -> Iterator[Finding]:
    seconds = sum(whole("timing_s/step"))
    trainer, engines = (
        sum(whole(name)) / seconds if seconds else 0.0
        for name in ("timing_s/wait_rollouts", "timing_s/engines_wait")
    )
    if trainer > 0.2 and trainer > engines:
        yield Finding(
            f"The trainer waits for rollouts {trainer:.0%} of the time.",
            "Give more devices to trainer.rollout_devices, and fewer to the trainer; if some responses are much longer than "
            "others, set rollout.partial and a trainer.max_staleness of 2 or more.",
            "timing_s/wait_rollouts",
        )
    elif engines > 0.2:
        yield Finding(
            f"The engines wait for new weights {engines:.0%} of the time.",
            "Give fewer devices to trainer.rollout_devices, and more to the trainer.",
            "timing_s/engines_wait",
        )


def _retired(first: Column, last: Column, whole: Column) -> Iterator[Finding]:
    engines = whole("perf/engines")
    if engines and engines[-1] < max(engines):
        yield Finding(
            f"Of {max(engines):.0f} engines, {max(engines) - engines[-1]:.0f} could not be started again; the others have "
            "generated everything since.",
            "The run's log has the reason of each. A run that is resumed asks for all trainer.rollout_devices again.",
            "perf/engines",
        )
