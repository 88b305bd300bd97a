"""What the loop asks of the workers, in its own words."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from iiverl_core.algorithms import find_policy_loss
from iiverl_core.cluster.engines import Engines
from iiverl_core.cluster.runtime import WorkerGroup
from iiverl_core.cluster.worker import Advantages, TokenArrays, Trained, Worker
from iiverl_core.config import Config
from iiverl_core.config.roles import micro_batching
from iiverl_core.controller.batch import Division, divide, divide_for_training
from iiverl_core.rollout import RolloutRequest, Sampling
from iiverl_core.samples import Handle, Sample
from iiverl_core.training import Role
from iiverl_core.training.metrics import merge
from iiverl_core.training.planning import Packing

T = TypeVar("T")


class Workers:
    """The processes of a run, spoken to about samples: divides them over the ranks, and gathers what comes back."""

    def __init__(self, group: WorkerGroup, engines: Engines, config: Config) -> None:
        self._group, self._engines = group, engines
        self._config = config
        self._ranks = group.infos[0].place.data_size
        actor = config.actor_rollout_ref.actor
        prescribed = find_policy_loss(actor.policy_loss.loss_mode).loss_agg_mode
        # How losses of tokens become the loss of a mini-batch; the critic's is a mean over tokens.
        self._aggregation: dict[Trained, str] = {
            "actor": prescribed or actor.loss_agg_mode,
            "critic": "token-mean",
        }

    def update_rollout_weights(self, version: int) -> None:
        """Give every engine the actor's weights, those that had died as well."""
        self._engines.update_weights(version)

    def generate(self, requests: Sequence[RolloutRequest], sampling: Sampling) -> Iterator[list[Sample]]:
        """Make rollouts; yield samples as they finish. Those that an engine that dies has not finished do not come.

        Engines get whole groups in turn, since a prompt is computed once for all responses to it.
        """
        groups: dict[int, list[RolloutRequest]] = {}
        for request in requests:
            groups.setdefault(request.id.group, []).append(request)
        parts: list[list[RolloutRequest]] = [[] for _ in range(len(self._engines))]
        for i, group in enumerate(groups.values()):
            parts[i % len(parts)] += group
        return self._engines.generate(parts, sampling)

    def sleep(self, *, discard_weights: bool) -> None:
        """Let the engines release the memory that training needs, with `discard_weights` their weights' as well."""
        self._engines.sleep(discard_weights=discard_weights)

    def evaluate(self, role: Role, samples: Sequence[Sample]) -> tuple[list[Handle], list[float]]:
        """Log-probs of each sample's tokens under a policy, or their values: handles, and sums."""
        division = self._divide(role, samples)
        results: list[TokenArrays] = self._on_shares(Worker.evaluate, division, lambda share: (role, share))
        return (
            division.restore([result.handles for result in results]),
            division.restore([result.sums for result in results]),
        )

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """Score samples with the reward model."""
        division = self._divide("reward", samples)
        return division.restore(self._on_shares(Worker.score, division, lambda share: (share,)))

    def advantages(
        self, samples: list[Sample], scores: list[float], baselines: list[float] | None, kl_coef: float
    ) -> Advantages:
        """Advantages of a step's samples; one worker computes them."""
        return self._group.run_on(0, Worker.advantages, samples, scores, baselines, kl_coef)

    def choose(self, samples: list[Sample]) -> list[Handle]:
        """Tokens of a mini-batch that the policy loss chooses; one worker does."""
        return self._group.run_on(0, Worker.choose, samples)

    def update(
        self, role: Trained, samples: Sequence[Sample], lr: float, arrays: tuple[str, ...]
    ) -> tuple[dict[str, float], Division]:
        """Make one optimizer step on a mini-batch; return its metrics, and how it was divided."""
        division = divide_for_training(
            samples,
            self._ranks,
            self._packing(role, train=True),
            balanced=self._config.trainer.balance_batch,
            loss_agg_mode=self._aggregation[role],
            horizon=self._config.actor_rollout_ref.actor.loss_scale_factor
            or self._config.data.max_response_length,
            arrays=arrays,
        )
        results = self._on_shares(Worker.update, division, lambda share: (role, share, lr))
        metrics: dict[str, float] = {}
        for part, _ in results:
            merge(metrics, part)
        step = results[0][1]
        return metrics | {
            f"{role}/grad_norm": step.grad_norm,
            f"{role}/skipped_updates": float(not step.taken),
        }, division

    def memory(self) -> dict[str, int]:
        """Memory in bytes of the fullest device and host."""
        reports = self._group.run(Worker.memory, [()] * len(self._group.infos))
        return {name: max(report[name] for report in reports) for name in reports[0]}

    def _divide(self, role: Role, samples: Sequence[Sample]) -> Division:
        balanced = self._config.trainer.balance_batch
        return divide(samples, self._ranks, self._packing(role, train=False), balanced=balanced)

    def _on_shares(
        self, method: Callable[..., T], division: Division, arguments: Callable[[Any], tuple[Any, ...]]
    ) -> list[T]:
        """Call a method on every worker with its data rank's share, and return one result a data rank."""
        places = [info.place for info in self._group.infos]
        results = self._group.run(method, [arguments(division.shares[place.data_rank]) for place in places])
        reported = {p.data_rank: result for p, result in zip(places, results, strict=True) if p.reports}
        return [reported[rank] for rank in range(self._ranks)]

    def _packing(self, role: Role, *, train: bool) -> Packing:
        """Read how large a model's micro-batches are, where it is trained or only run forward.

        A number of sequences, where one is set and the batches are not dynamic; else a budget of tokens.
        """
        batching = micro_batching(self._config, role, train=train)
        sequences = batching.sequences(self._ranks)
        if sequences is not None:
            return Packing(sequences=sequences)
        return Packing(tokens=batching.tokens, padded=not batching.model.use_remove_padding)
