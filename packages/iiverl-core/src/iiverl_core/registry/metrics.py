"""The metrics that a run logs, by name or by a pattern of names.

Packages add theirs under the entry-point group `iiverl.metrics`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from iiverl_core.registry.registry import Info, Registry

GROUP = "iiverl.metrics"


@dataclass(frozen=True, kw_only=True)
class Metric(Info):
    """A metric: `code` computes it, `summary` is its meaning, `unit` its unit.

    A name may be a pattern: `{a,b}` stands for each of the words, and `{word}` for any text. In other packages the name is
    no pattern, and `code` is a function of all rollouts of a training step, failed ones too, that returns a number, or
    None if the step has no value.
    """

    unit: str

    def unusable(self) -> str | None:
        """See `Info.unusable`."""
        return (
            f"{self.name} is a pattern; code outside iiverl computes one metric by its name"
            if "{" in self.name
            else None
        )

    def matches(self, name: str) -> bool:
        """Return whether a name matches this metric."""
        return any(re.fullmatch(pattern, name) for pattern in self._patterns())

    def _patterns(self) -> Iterator[str]:
        """Yield a regular expression for each combination of the alternatives."""
        parts = re.split(r"\{([^}]*)\}", self.name)
        text, braces = parts[::2], parts[1::2]
        choices = [[re.escape(word) for word in b.split(",")] if "," in b else [".+"] for b in braces]
        for words in product(*choices):
            yield "".join(re.escape(t) + c for t, c in zip(text, (*words, ""), strict=True))


def describe(name: str) -> Metric | None:
    """Find a metric by name or by the first pattern that matches it; None if it is unknown."""
    return METRICS.get(name) or next((metric for metric in METRICS.values() if metric.matches(name)), None)


_METRICS = "iiverl_core.telemetry.metrics"
_VALIDATION = "iiverl_core.telemetry.validation:validation_metrics"
_LOSSES = "iiverl_core.training.losses"
_LOOP = "iiverl_core.controller.trainer:Trainer"
_ROLLOUTS = "iiverl_core.controller.collector:RolloutCollector"
_QUEUE = "iiverl_core.controller.rollout_queue:RolloutQueue"
_BATCH = f"{_METRICS}:batch_metrics"
_LENGTHS = f"{_METRICS}:seqlen_metrics"
_PERF = f"{_METRICS}:perf_metrics"
_ACTOR = f"{_LOSSES}:actor_loss"
_CRITIC = f"{_LOSSES}:critic_loss"
_CLIPPED = "iiverl_core.algorithms.policy_losses.base:clip_metrics"
_TIMERS = "iiverl_core.telemetry.timers:Timers"
_STATS = "{mean,max,min}"


def _metric(name: str, unit: str, summary: str, code: str) -> Metric:
    return Metric(name=name, unit=unit, summary=summary, code=code)


METRICS = Registry(
    "metric",
    GROUP,
    Metric,
    (
        _metric(
            f"critic/score/{_STATS}",
            "score",
            "score that the reward source gave, before any KL penalty",
            _BATCH,
        ),
        _metric(f"critic/rewards/{_STATS}", "score", "score minus the KL penalty of the response", _BATCH),
        _metric(f"critic/advantages/{_STATS}", "", "advantage of each token", _BATCH),
        _metric(f"critic/returns/{_STATS}", "score", "return of each token", _BATCH),
        _metric(
            f"critic/values/{_STATS}", "score", "value of each token before the update; with a critic", _BATCH
        ),
        _metric(
            "critic/kl", "nats/token", "KL in the reward before its coefficient, mean over responses", _LOOP
        ),
        _metric("critic/kl_coeff", "", "coefficient of the KL penalty in the reward", _LOOP),
        _metric("critic/vf_loss", "score²", "value loss; with a critic", _CRITIC),
        _metric(
            "critic/vf_clipfrac", "fraction", "tokens whose value loss is clipped; with a critic", _CRITIC
        ),
        _metric(
            "critic/vpred_mean", "score", "value of each token during the update; with a critic", _CRITIC
        ),
        _metric(
            "critic/vf_explained_var",
            "fraction",
            "variance of the returns that the values explain, before the update; with a critic",
            "iiverl_core.training.estimation:explained_variance",
        ),
        _metric(
            "reward/failed",
            "responses",
            "responses whose scoring failed, even if a constant replaced the score",
            _BATCH,
        ),
        _metric("reward/failed/{kind}", "responses", "the same for one kind of failure", _BATCH),
        _metric(
            "reward/dropped_samples",
            "responses",
            "responses of the batch that the update does not use",
            _LOOP,
        ),
        _metric(
            "reward/hidden_fraction",
            "fraction",
            "scoring time that passed while responses were generated",
            _ROLLOUTS,
        ),
        _metric(
            "reward/{component}/mean",
            "score",
            "one component of the score, over the responses that have it",
            _BATCH,
        ),
        _metric("rollout/turns", "turns", "responses of the policy per rollout; with several turns", _BATCH),
        _metric(
            "rollout/env_failures",
            "rollouts",
            "rollouts whose environment raised, hung, died or answered garbage; with several turns",
            _BATCH,
        ),
        _metric(
            "rollout/context_full",
            "fraction",
            "rollouts that ended because no more tokens fit; with several turns",
            _BATCH,
        ),
        _metric("rollout/tool_calls", "calls", "calls of tools per rollout", _BATCH),
        _metric(
            "rollout/tool_errors", "calls", "calls of tools per rollout whose result is an error", _BATCH
        ),
        _metric("rollout/tool_seconds", "s", "time per rollout in which its tools ran", _BATCH),
        _metric("actor/pg_loss", "", "policy loss", _ACTOR),
        _metric("actor/entropy_loss", "nats", "entropy of the policy, aggregated as the loss is", _ACTOR),
        _metric(
            "actor/kl_loss",
            "nats",
            "KL from the reference, aggregated as the loss is; with use_kl_loss",
            _ACTOR,
        ),
        _metric("actor/kl_coef", "", "weight of that KL in the loss; with use_kl_loss", _LOOP),
        _metric("actor/pg_clipfrac", "fraction", "tokens whose policy loss is clipped", _CLIPPED),
        _metric(
            "actor/pg_clipfrac_lower",
            "fraction",
            "tokens clipped by a second bound, as by dual clip",
            _CLIPPED,
        ),
        _metric("actor/ppo_kl", "nats/token", "KL from the policy before the step's first update", _CLIPPED),
        _metric("{actor,critic}/lr", "", "learning rate of the step", _LOOP),
        _metric(
            "{actor,critic}/grad_norm",
            "",
            "norm of the gradient before clipping, mean over updates",
            "iiverl_core.training.backend:StepResult",
        ),
        _metric(
            "{actor,critic}/skipped_updates",
            "fraction",
            "updates that were not made because the gradient was not finite",
            "iiverl_core.training.backend:StepResult",
        ),
        _metric(
            "actor/{name}", "", "metric of this name reported by a policy loss, mean over tokens", _ACTOR
        ),
        _metric("rollout/kl", "nats/token", "KL of the engine's distribution from the trainer's", _ACTOR),
        _metric(
            "rollout/kl/staleness_{steps}",
            "nats/token",
            "the same of tokens whose weights were older than in turns by so many steps; with max_staleness",
            _ACTOR,
        ),
        _metric(
            "rollout/ratio/{mean,max}", "ratio", "trainer's probability of a token over the engine's", _ACTOR
        ),
        _metric("rollout/weight/mean", "ratio", "importance weight; with rollout_correction", _ACTOR),
        _metric(
            "rollout/rejected", "fraction", "tokens with importance weight 0; with rollout_correction", _ACTOR
        ),
        _metric(
            "train/num_gen_batches",
            "batches",
            "batches generated to fill the step's; with filter_groups",
            _ROLLOUTS,
        ),
        _metric(
            "train/uniform_groups",
            "groups",
            "groups dropped because all responses score the same; with filter_groups",
            _ROLLOUTS,
        ),
        _metric(
            "train/missing_groups",
            "groups",
            "groups missing from a full batch; with filter_groups",
            _ROLLOUTS,
        ),
        _metric(f"response_length/{_STATS}", "tokens", "tokens of a response", _BATCH),
        _metric("response_length/clip_ratio", "fraction", "responses that the length limit ended", _BATCH),
        _metric(
            "response/duplicates", "fraction", "responses that another one to the same prompt equals", _BATCH
        ),
        _metric(
            "critic/score/length_correlation",
            "",
            "Pearson's coefficient of score and tokens of a response; if neither is always the same",
            _BATCH,
        ),
        _metric(f"prompt_length/{_STATS}", "tokens", "tokens of a prompt", _BATCH),
        _metric("prompt_length/clip_ratio", "fraction", "prompts of data.max_prompt_length tokens", _BATCH),
        _metric(
            "global_seqlen/{min,max}", "tokens", "tokens per data-parallel rank, before balancing", _LENGTHS
        ),
        _metric("global_seqlen/minmax_diff", "tokens", "difference of the two", _LENGTHS),
        _metric(
            "global_seqlen/balanced_{min,max}",
            "tokens",
            "tokens that a data-parallel rank computes in an update's epoch, shared prompts once",
            _LENGTHS,
        ),
        _metric("global_seqlen/mean", "tokens", "mean tokens per data-parallel rank", _LENGTHS),
        _metric("perf/total_num_tokens", "tokens", "tokens of all prompts and responses", _PERF),
        _metric("perf/time_per_step", "s", "wall time of the step", _PERF),
        _metric(
            "perf/throughput", "tokens/s/device", "prompt and response tokens per second and device", _PERF
        ),
        _metric(
            "perf/shared_prompts/{actor,critic}",
            "fraction",
            "tokens that the update saves by computing prompts once per micro-batch",
            f"{_METRICS}:shared_fractions",
        ),
        _metric(
            "perf/max_memory_{allocated,reserved}_gb",
            "GiB",
            "peak memory of the fullest device; on GPUs",
            _PERF,
        ),
        _metric("perf/cpu_memory_used_gb", "GiB", "memory used on the fullest host", _PERF),
        _metric("perf/weight_sync_gb", "GiB", "weights that each engine was given after the step", _PERF),
        _metric(
            "perf/mfu/{actor,critic}",
            "fraction",
            "share of the devices' peak FLOP/s that the update uses; on known devices",
            "iiverl_core.telemetry.flops:mfu",
        ),
        _metric(
            "staleness/{mean,max}",
            "steps",
            "steps by which the weights that generated are older than in turns; with max_staleness",
            _QUEUE,
        ),
        _metric(
            "staleness/several_versions",
            "fraction",
            "rollouts that were written by the weights of several versions; with rollout.partial",
            _QUEUE,
        ),
        _metric(
            "perf/rollouts_ready",
            "steps",
            "further steps whose rollouts are ready; with max_staleness",
            _QUEUE,
        ),
        _metric(
            "perf/early_mini_batches",
            "mini-batches",
            "mini-batches that were trained before the step's last response was there; with rollout.partial",
            _QUEUE,
        ),
        _metric(
            "perf/engines",
            "engines",
            "engines that are in use after the step, and not retired; with rollout.min_engines",
            _QUEUE,
        ),
        _metric(
            "timing_s/engines_wait",
            "s",
            "time in which the engines waited for weights before the step's rollouts; with max_staleness",
            _QUEUE,
        ),
        _metric(
            "timing_s/wait_rollouts", "s", "waiting for the step's rollouts; with max_staleness", _TIMERS
        ),
        _metric("timing_s/gen", "s", "generating, with the scoring that overlaps it", _TIMERS),
        _metric("timing_s/reward", "s", "waiting for scores after the last response", _TIMERS),
        _metric("timing_s/old_log_prob", "s", "log-probs of the policy before the update", _TIMERS),
        _metric("timing_s/ref", "s", "log-probs of the reference", _TIMERS),
        _metric("timing_s/values", "s", "values", _TIMERS),
        _metric("timing_s/adv", "s", "advantages", _TIMERS),
        _metric("timing_s/update_{actor,critic}", "s", "updates of a model", _TIMERS),
        _metric("timing_s/update_weights", "s", "weight sync from the trainer to the engines", _TIMERS),
        _metric(
            "timing_s/save_checkpoint", "s", "copying a checkpoint, and waiting for the one before", _TIMERS
        ),
        _metric("timing_s/testing", "s", "validation", _TIMERS),
        _metric("timing_s/step", "s", "the whole step, with a validation if one is due", _TIMERS),
        _metric(
            "timing_per_token_ms/gen",
            "ms/token",
            "generating, per response token",
            f"{_METRICS}:token_timings",
        ),
        _metric(
            "timing_per_token_ms/{ref,values,adv,update_critic,update_actor}",
            "ms/token",
            "the same part of the step, per prompt and response token",
            f"{_METRICS}:token_timings",
        ),
        _metric(
            "val/test_score/{data_source}/mean@{n}",
            "score",
            "mean score of n responses per prompt",
            _VALIDATION,
        ),
        _metric(
            "val/test_score/{data_source}/best@{k}",
            "score",
            "expected highest score of k responses (pass@k for scores 0 and 1)",
            _VALIDATION,
        ),
        _metric(
            "val/test_score/{data_source}/worst@{n}", "score", "lowest score of n responses", _VALIDATION
        ),
        _metric(
            "val/test_score/{data_source}/maj@{n}",
            "score",
            "score of the most frequent of n answers",
            _VALIDATION,
        ),
        _metric(
            "val/test_score/{data_source}", "score", "mean score of the validation's responses", _VALIDATION
        ),
        _metric("val/failed", "responses", "validation responses whose scoring failed", _VALIDATION),
        _metric("val/response_length/mean", "tokens", "tokens of a validation response", _VALIDATION),
        _metric(
            "val/response_length/clip_ratio",
            "fraction",
            "validation responses that the length limit ended",
            _VALIDATION,
        ),
    ),
)
"""In the order of `docs/metrics.md`; the first pattern that matches a name describes it."""
