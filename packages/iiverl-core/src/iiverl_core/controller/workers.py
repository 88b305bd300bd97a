"""What the loop asks of the workers, in its own words."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from iiverl_core.cluster.runtime import WorkerGroup
from iiverl_core.cluster.worker import Advantages, LogProbs, Worker
from iiverl_core.config import Config
from iiverl_core.controller.batch import Division, divide, divide_for_training
from iiverl_core.samples import Handle, Prompt, Sample
from iiverl_core.training.planning import Packing

T = TypeVar("T")


class Workers:
    """A worker group, spoken to about samples: divides them over the ranks, and gathers what comes back."""

    def __init__(self, group: WorkerGroup, config: Config) -> None:
        self._group = group
        self._config = config
        self._ranks = group.infos[0].place.data_size

    def update_rollout_weights(self, version: int) -> None:
        """Give every engine the actor's weights."""
        self._group.run(Worker.update_rollout_weights, [(version,)] * len(self._group.infos))

    def generate(
        self, prompts: Sequence[tuple[int, Prompt, int]], *, validate: bool
    ) -> Iterator[list[Sample]]:
        """Answer prompts, given with group and seed; yield samples as they finish."""
        engines = len(self._group.infos)
        return self._group.stream(Worker.generate, [(prompts[i::engines], validate) for i in range(engines)])

    def log_probs(self, model: str, samples: Sequence[Sample]) -> tuple[list[Handle], list[float]]:
        """Log-probs of each sample's tokens under `actor` or `reference`: handles, and sums."""
        config = self._config.actor_rollout_ref
        section = config.rollout if model == "actor" else config.ref
        packing = self._packing(
            section.log_prob_micro_batch_size_per_gpu,
            section.log_prob_micro_batch_size,
            section.log_prob_use_dynamic_bsz,
            section.log_prob_max_token_len_per_gpu,
        )
        division = divide(samples, self._ranks, packing, balanced=self._config.trainer.balance_batch)
        results: list[LogProbs] = self._on_shares(Worker.log_probs, division, lambda share: (model, share))
        return (
            division.restore([result.handles for result in results]),
            division.restore([result.sums for result in results]),
        )

    def advantages(self, samples: list[Sample], scores: list[float], kl_coef: float) -> Advantages:
        """Advantages of a step's samples; one worker computes them."""
        return self._group.run_on(0, Worker.advantages, samples, scores, kl_coef)

    def update_actor(
        self, samples: Sequence[Sample], lr: float, arrays: tuple[str, ...]
    ) -> tuple[dict[str, float], Division]:
        """Make one optimizer step on a mini-batch; return its metrics, and how it was divided."""
        config = self._config.actor_rollout_ref.actor
        packing = self._packing(
            config.ppo_micro_batch_size_per_gpu,
            config.ppo_micro_batch_size,
            config.use_dynamic_bsz,
            config.ppo_max_token_len_per_gpu,
        )
        division = divide_for_training(
            samples,
            self._ranks,
            packing,
            balanced=self._config.trainer.balance_batch,
            loss_agg_mode=config.loss_agg_mode,
            horizon=config.loss_scale_factor or self._config.data.max_response_length,
            arrays=arrays,
        )
        results = self._on_shares(Worker.update_actor, division, lambda share: (share, lr))
        metrics: dict[str, float] = {}
        for part, _ in results:
            for name, value in part.items():
                metrics[name] = metrics.get(name, 0.0) + value
        step = results[0][1]
        return metrics | {
            "actor/grad_norm": step.grad_norm,
            "actor/skipped_updates": float(not step.taken),
        }, division

    def memory(self) -> dict[str, int]:
        """Memory in bytes of the fullest device and host."""
        reports = self._group.run(Worker.memory, [()] * len(self._group.infos))
        return {name: max(report[name] for report in reports) for name in reports[0]}

    def _on_shares(
        self, method: Callable[..., T], division: Division, arguments: Callable[[Any], tuple[Any, ...]]
    ) -> list[T]:
        """Call a method on every worker with its data rank's share, and return one result a data rank."""
        places = [info.place for info in self._group.infos]
        results = self._group.run(method, [arguments(division.shares[place.data_rank]) for place in places])
        reported = {p.data_rank: result for p, result in zip(places, results, strict=True) if p.reports}
        return [reported[rank] for rank in range(self._ranks)]

    def _packing(self, per_device: int | None, in_all: int | None, dynamic: bool, tokens: int) -> Packing:
        """Read the four keys that say how large a micro-batch is; where none does, it is filled to the token budget."""
        if not dynamic and per_device is not None:
            return Packing(sequences=per_device)
        if not dynamic and in_all is not None:
            return Packing(sequences=max(in_all // self._ranks, 1))
        return Packing(tokens=tokens, padded=not self._config.actor_rollout_ref.model.use_remove_padding)
