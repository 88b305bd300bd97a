"""Compute on one worker, for all ranks, the advantages of a step and the tokens that a policy loss selects."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from iiverl_core.algorithms import Estimator, PolicyBatch, PolicyLoss, Segments
from iiverl_core.cluster.messages import Advantages
from iiverl_core.cluster.store import Store, open_all, put_all
from iiverl_core.config import RunConfig
from iiverl_core.errors import NonFiniteError
from iiverl_core.samples import ROLLOUT_LOG_PROBS, TURN_REWARDS, Handle, SampleId, SequenceRef
from iiverl_core.training.estimation import ScoredStep, estimate, explained_variance
from iiverl_core.training.losses import policy_loss_settings


def compute_advantages(
    run: RunConfig,
    store: Store,
    estimator: Estimator,
    sequences: Sequence[SequenceRef],
    scores: Sequence[float],
    baselines: Sequence[float] | None,
    kl_coef: float,
) -> Advantages:
    """Compute the advantages of a step; `kl_coef` 0 means no KL in the reward.

    `scores` and, if the estimator needs them, `baselines` have one entry per rollout. The sequences of a rollout follow
    one another. Their trained tokens make one segment, the last of which gets the score: estimators compare rollouts,
    however many sequences each has.
    """
    trained: dict[SampleId, int] = {}  # tokens per rollout
    for sequence in sequences:
        trained[sequence.id] = trained.get(sequence.id, 0) + sequence.trained
    number = {group: i for i, group in enumerate(dict.fromkeys(id.group for id in trained))}
    segments = Segments.of(list(trained.values()))
    values_T = _flat(store, sequences, "values") if run.uses_critic else None
    step = ScoredStep(
        segments,
        torch.tensor(scores, dtype=torch.float64) if run.rewards.by_turn else torch.tensor(scores),
        torch.tensor([number[id.group] for id in trained]),
        baseline_B=None if baselines is None else torch.tensor(baselines),
        old_T=_flat(store, sequences, _old_log_probs(run)) if kl_coef else None,
        ref_T=_flat(store, sequences, "ref_log_probs") if kl_coef else None,
        values_T=values_T,
        turn_rewards_T=_turn_rewards(store, sequences) if run.rewards.by_turn else None,
    )
    result = estimate(step, estimator, run.algorithm, kl_coef)
    for name, x_T in (("advantage", result.advantages_T), ("return", result.returns_T)):
        if not x_T.isfinite().all():
            position = int(x_T.isfinite().logical_not().nonzero()[0])
            raise _not_finite(name, segments, list(trained), scores, position)
    by_token = {"advantages": result.advantages_T, "returns": result.returns_T}
    by_token |= {} if values_T is None else {"values": values_T}
    return Advantages(
        advantages=_put(store, sequences, result.advantages_T),
        returns=_put(store, sequences, result.returns_T),
        means=segments.mean(result.advantages_T).tolist(),
        rewards=result.rewards_B.tolist(),
        kl=segments.mean(result.kl_T).mean().item(),
        token_stats={name: _stats(x_T) for name, x_T in by_token.items()},
        explained_variance=None if values_T is None else explained_variance(values_T, result.returns_T),
    )


def select_tokens(
    run: RunConfig, store: Store, policy_loss: PolicyLoss, sequences: Sequence[SequenceRef]
) -> list[Handle]:
    """Let the policy loss select tokens of a whole mini-batch, whose sequences have their current `log_probs`.

    Raises:
        RuntimeError: the policy loss selects none.
    """
    if policy_loss.select_tokens is None:
        raise RuntimeError("this policy loss selects no tokens")
    segments = Segments.of([sequence.trained for sequence in sequences])
    log_probs_T, old_T, advantages_T = (
        _flat(store, sequences, name) for name in ("log_probs", _old_log_probs(run), "advantages")
    )
    batch = PolicyBatch(log_probs_T, old_T, advantages_T, segments)
    return _put(store, sequences, policy_loss.select_tokens(batch, policy_loss_settings(run.loss)))


def _old_log_probs(run: RunConfig) -> str:
    return ROLLOUT_LOG_PROBS if run.algorithm.rollout_correction.bypass_old_log_prob else "old_log_probs"


def _flat(store: Store, sequences: Sequence[SequenceRef], name: str) -> Tensor:
    if name == ROLLOUT_LOG_PROBS:
        arrays = [each.trained_log_probs for each in open_all(store, [each.tokens for each in sequences])]
    else:
        arrays = open_all(store, [sequence.arrays[name] for sequence in sequences])
    return torch.from_numpy(np.concatenate(arrays))


def _turn_rewards(store: Store, sequences: Sequence[SequenceRef]) -> Tensor:
    """Read the rewards of turns; a rollout that failed and has a constant score has none."""
    arrays = [
        each.extras.get(TURN_REWARDS, np.zeros(each.trained, dtype=np.float32))
        for each in open_all(store, [each.tokens for each in sequences])
    ]
    return torch.from_numpy(np.concatenate(arrays))


def _put(store: Store, sequences: Sequence[SequenceRef], x_T: Tensor) -> list[Handle]:
    parts = x_T.split([sequence.trained for sequence in sequences])
    return put_all(store, [part.numpy() for part in parts])


def _not_finite(
    name: str, segments: Segments, ids: Sequence[SampleId], scores: Sequence[float], position: int
) -> NonFiniteError:
    """Make the error for a token whose advantage or return is not finite, which names its sample and likely cause."""
    sample = int(segments.index_T[position])
    extreme = max(range(len(scores)), key=lambda i: abs(scores[i]))
    return NonFiniteError(
        f"The {name} of a token of {ids[sample]} is not finite. The sample's score is {scores[sample]:g}; the most extreme "
        f"score of the step is {scores[extreme]:g}, of {ids[extreme]}.\nBound the reward. If the scores are ordinary, "
        "log-probs or values are not finite, so the weights may have diverged: lower the learning rate, or compute in fp32."
    )


def _stats(x_T: Tensor) -> tuple[float, float, float]:
    return x_T.mean().item(), x_T.max().item(), x_T.min().item()
