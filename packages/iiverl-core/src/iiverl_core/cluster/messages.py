"""The arguments and results of worker calls; they are small, since handles name the token arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from iiverl_core.samples import Handle, SequenceRef
from iiverl_core.training import LayoutKind, ParallelRank, Role, StepResult

Trained: TypeAlias = Literal["actor", "critic"]
StalenessRuns: TypeAlias = tuple[tuple[int, int], ...]
"""Steps by which the weights of some tokens are older than in turn, and the number of these tokens; for a sequence."""


@dataclass(frozen=True)
class WorkerInfo:
    """A worker's process and device; its position in each model, the model's size, and the layout of its inputs."""

    rank: int
    host: str
    pid: int
    device: str
    parallel_ranks: Mapping[Role, ParallelRank]
    parameters: Mapping[Role, int]
    trained_parameters: Mapping[Role, int]
    layouts: Mapping[Role, LayoutKind]


@dataclass(frozen=True)
class WeightSync:
    """A weight sync to `version`.

    With `verify`, engines check that they compute with what they are given. Without `base`, they are given LoRA
    adapters only, and keep the weights of the base model.
    """

    version: int
    verify: bool = True
    base: bool = True


@dataclass(frozen=True)
class ReceivedWeights:
    """What an engine was given in a weight sync: its size in bytes and, if it is verified, the digest of each weight."""

    sync: WeightSync
    nbytes: int
    digests: Mapping[str, int]


@dataclass(frozen=True)
class RankBatch:
    """One rank's part of a batch.

    `micro_batches` name sequences by position; an empty one is a dummy. For training, `weights` is the loss weight of
    each sequence's trained tokens, `inv_num_tokens` one over the trained tokens of the whole mini-batch, and `arrays`
    names the arrays that the loss reads. With `keeps_log_probs`, an update keeps those that it computes. `staleness` has, for
    each sequence, by how many steps the weights that sampled its trained tokens are older than in turn: pairs of steps and
    a number of tokens, in their order; `tokens_by_staleness` counts those of the whole mini-batch. Both are empty if
    nothing is to be reported by staleness.
    """

    sequences: list[SequenceRef]
    micro_batches: list[list[int]]
    weights: list[float]
    inv_num_tokens: float = 0.0
    arrays: tuple[str, ...] = ()
    keeps_log_probs: bool = False
    staleness: list[StalenessRuns] = field(default_factory=list)
    tokens_by_staleness: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Updated:
    """The result of an optimizer step on a rank: its part of the metrics, and the step.

    `log_probs` are handles to the log-probs of each sequence before the step, if the batch keeps them.
    """

    metrics: dict[str, float]
    step: StepResult
    log_probs: list[Handle] = field(default_factory=list)


@dataclass(frozen=True)
class TokenArrays:
    """A number per trained token of some sequences: a handle to each (trained,) fp32 array, and each array's sum."""

    handles: list[Handle]
    sums: list[float]


@dataclass(frozen=True)
class Advantages:
    """Advantages and returns of a step.

    `advantages` and `returns` are handles to (trained,) fp32 arrays, one per sequence. `means` (of the advantages) and
    `rewards` (after the KL penalty) have one entry per rollout. `kl` is the mean over rollouts of the mean over tokens
    of the KL in the reward, before its coefficient; `token_stats` mean, maximum and minimum over all tokens of
    `advantages`, `returns` and, with a critic, `values`; `explained_variance` the share of the returns' variance that
    the critic predicts.
    """

    advantages: list[Handle]
    returns: list[Handle]
    means: list[float]
    rewards: list[float]
    kl: float
    token_stats: dict[str, tuple[float, float, float]]
    explained_variance: float | None = None

    def joined(self, other: "Advantages", tokens: Sequence[int]) -> "Advantages":
        """Append those of other rollouts; `tokens` are the trained tokens of both. None may have a critic."""
        total = sum(tokens)
        stats = {
            name: (
                (mean * tokens[0] + others[0] * tokens[1]) / total,
                max(most, others[1]),
                min(least, others[2]),
            )
            for name, (mean, most, least) in self.token_stats.items()
            if (others := other.token_stats[name])
        }
        rollouts = len(self.means), len(other.means)
        return Advantages(
            self.advantages + other.advantages,
            self.returns + other.returns,
            self.means + other.means,
            self.rewards + other.rewards,
            (self.kl * rollouts[0] + other.kl * rollouts[1]) / sum(rollouts),
            stats,
        )

    def reordered(self, rollouts: Sequence[int], sequences: Sequence[int]) -> "Advantages":
        """Put the entries of rollouts and of sequences into another order, given by their positions in this one."""
        return replace(
            self,
            advantages=[self.advantages[i] for i in sequences],
            returns=[self.returns[i] for i in sequences],
            means=[self.means[i] for i in rollouts],
            rewards=[self.rewards[i] for i in rollouts],
        )
