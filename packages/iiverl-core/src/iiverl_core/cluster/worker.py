"""The process on a device: its share of every model and, unless engines have devices of their own, a rollout engine.

All workers of a group get the same calls in the same order, each with its own arguments. A call takes and returns
small things; token arrays stay in the store and are named by handles.
"""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import psutil
import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from iiverl_core.algorithms import PolicyBatch, Segments, find_estimator, find_policy_loss
from iiverl_core.cluster.generation import Generator, Question
from iiverl_core.cluster.meeting import free_address, join
from iiverl_core.cluster.models import build_models
from iiverl_core.cluster.store import Store, open_all, put_all
from iiverl_core.cluster.ways import Sender, Way
from iiverl_core.cluster.weights import Departing
from iiverl_core.config import Config
from iiverl_core.rollout import Sampling
from iiverl_core.samples import Handle, Prompt, Sample, Tokens
from iiverl_core.training import Loss, MicroBatch, Place, Role, StepResult, TrainingBackend
from iiverl_core.training.batching import ROLLOUT_LOG_PROBS, filler, make_micro_batch
from iiverl_core.training.estimation import ScoredStep, estimate, explained_variance
from iiverl_core.training.losses import actor_loss, critic_loss, policy_loss_settings, rollout_correction

Trained: TypeAlias = Literal["actor", "critic"]


@dataclass(frozen=True)
class WorkerInfo:
    """What the controller needs to know of a worker; `parameters` is the size of each whole model."""

    rank: int
    host: str
    pid: int
    device: str
    place: Place
    parameters: Mapping[Role, int]


@dataclass(frozen=True)
class TokenArrays:
    """A number for each response token of some samples: a handle to each (R,) fp32 array, and each array's sum."""

    handles: list[Handle]
    sums: list[float]


@dataclass(frozen=True)
class Advantages:
    """Advantages and returns of a step's samples.

    Handles to (R,) fp32 arrays, and the mean of each of `advantages`; `rewards` after the KL penalty, one a sample;
    `kl`, the mean over samples of the mean over tokens of the KL in the reward, before its coefficient; `token_stats`,
    mean, maximum and minimum over all tokens of `advantages`, `returns` and, with a critic, `values`;
    `explained_variance`, the share of the returns' variance that the critic foresees.
    """

    advantages: list[Handle]
    returns: list[Handle]
    means: list[float]
    rewards: list[float]
    kl: float
    token_stats: dict[str, tuple[float, float, float]]
    explained_variance: float | None = None


@dataclass(frozen=True)
class Share:
    """One rank's part of a mini-batch.

    `micro_batches` name samples by position, and an empty one is a filler. For training, `weights` is the loss weight
    of a token of each sample, `token_share` one over the tokens of the whole mini-batch, and `arrays` names what the
    loss reads besides tokens.
    """

    samples: list[Sample]
    micro_batches: list[list[int]]
    weights: list[float]
    token_share: float = 0.0
    arrays: tuple[str, ...] = ()


class Worker:
    """One process of a group, on one device.

    `device_type` is `cpu` or `cuda`; on a CUDA machine the process is expected to see its own device alone.
    """

    def __init__(self, config: Config, rank: int, size: int, device_type: str, store: Store) -> None:
        self._config = config
        self._rank, self._size = rank, size
        self._device = torch.device(device_type)
        self._store = store
        self._generator: Generator | None = None

    def address(self, host: str) -> str:
        """Give the place where the group's processes can meet: a free port of this process's machine, `host`."""
        return free_address(host)

    def setup(self, meeting_point: str) -> WorkerInfo:
        """Join the others, and build the models and the engine.

        Raises:
            ConfigError: the backend is not installed, or a model, tokenizer or algorithm cannot be read.
        """
        disable_progress_bar()  # the run shows its own, and every worker's would be one too many
        join(meeting_point, self._rank, self._size, self._device.type)
        actor = self._config.actor_rollout_ref.actor
        self._models = build_models(self._config, self._device)
        self._estimator = find_estimator(self._config.algorithm.adv_estimator)
        self._policy_loss = find_policy_loss(actor.policy_loss.loss_mode)
        correction = rollout_correction(self._config.algorithm.rollout_correction)
        self._losses: dict[Trained, Loss] = {
            "actor": actor_loss(actor, self._policy_loss, correction),
            "critic": critic_loss(self._config.critic),
        }
        self._departing: Departing | None = None
        self._way: Way | None = None
        self._sender: Sender | None = None
        if not self._config.trainer.rollout_devices:
            self._generator = Generator(self._config, self._device, self._rank)
        return WorkerInfo(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu",
            place=self._models["actor"].place,
            parameters={role: model.parameter_count() for role, model in self._models.items()},
        )

    def update_rollout_weights(self, version: int) -> None:
        """Give the engine that lives here the actor's weights."""
        self._generating().update_weights(self._model("actor").named_weights(), version)

    def begin_departure(self, way: Way) -> None:
        """Let the actor's weights, from the first on, depart for engines elsewhere: the first that reports sends them."""
        if way != self._way:
            if self._sender is not None:
                self._sender.close()
            place = self._models["actor"].place
            first = place.reports and place.data_rank == 0
            self._sender = way.sender(self._store, self._device) if first else None
            self._way = way
        self._departing = Departing(self._model("actor").named_weights(), self._sender)

    def next_bucket(self, size: int) -> Any:
        """Send the next of these weights, at least `size` bytes, as `Departing.next` does. All workers take part."""
        if self._departing is None:
            raise RuntimeError("no weights depart: call begin_departure first")
        return self._departing.next(size)

    def generate(
        self, questions: Sequence[Question], sampling: Sampling
    ) -> Iterator[list[Tokens] | list[Sample]]:
        """Answer questions with the engine that lives here; yield as `Generator.generate` does.

        Where it lives in other workers as well, all of them get the same questions, and the first yields the samples.
        """
        return self._generating().generate(questions, sampling)

    def sleep(self, forget: bool) -> None:
        """Let the engine that lives here give back the memory that only generating needs; see `Generator.sleep`."""
        self._generating().sleep(forget)

    def evaluate(self, role: Role, share: Share) -> TokenArrays:
        """Run a model over the samples of `share`, in their order: log-probs of a policy, or values of the critic.

        A process that does not report only takes part.
        """
        micro_batches = self._micro_batches(share)
        outputs = self._model(role).forward(micro_batches)
        if not self._model(role).place.reports:
            return TokenArrays([], [])
        arrays: dict[int, np.ndarray] = {}
        for positions, batch, output in zip(share.micro_batches, micro_batches, outputs, strict=True):
            x_T = output.values_T if role == "critic" else output.log_probs_T
            if positions and x_T is not None:
                parts = batch.segments.split(x_T.float().cpu())
                arrays |= {i: part.numpy() for i, part in zip(positions, parts, strict=True)}
        ordered = [arrays[i] for i in range(len(share.samples))]
        return TokenArrays(put_all(self._store, ordered), [float(array.sum()) for array in ordered])

    def score(self, share: Share) -> list[float]:
        """Score the samples of `share` with the reward model, in their order, where this process reports."""
        outputs = self._model("reward").forward(self._micro_batches(share))
        if not self._model("reward").place.reports:
            return []
        scores: dict[int, float] = {}
        for positions, output in zip(share.micro_batches, outputs, strict=True):
            if positions and output.scores_B is not None:
                scores |= dict(zip(positions, output.scores_B.tolist(), strict=True))
        return [scores[i] for i in range(len(share.samples))]

    def advantages(
        self, samples: list[Sample], scores: list[float], baselines: list[float] | None, kl_coef: float
    ) -> Advantages:
        """Compute the advantages of a whole step's samples, which all have a score; `kl_coef` 0 is no KL in the reward."""
        number = {group: i for i, group in enumerate(dict.fromkeys(sample.group for sample in samples))}
        segments = Segments.of([sample.response_length for sample in samples])
        values_T = self._flat(samples, "values") if self._config.uses_critic else None
        step = ScoredStep(
            segments,
            torch.tensor(scores),
            torch.tensor([number[sample.group] for sample in samples]),
            baseline_B=None if baselines is None else torch.tensor(baselines),
            old_T=self._flat(samples, "old_log_probs") if kl_coef else None,
            ref_T=self._flat(samples, "ref_log_probs") if kl_coef else None,
            values_T=values_T,
        )
        result = estimate(step, self._estimator, self._config.algorithm, kl_coef)
        by_token = {"advantages": result.advantages_T, "returns": result.returns_T}
        by_token |= {} if values_T is None else {"values": values_T}
        return Advantages(
            advantages=self._put(segments, result.advantages_T),
            returns=self._put(segments, result.returns_T),
            means=segments.mean(result.advantages_T).tolist(),
            rewards=result.rewards_B.tolist(),
            kl=segments.mean(result.kl_T).mean().item(),
            token_stats={name: _stats(x_T) for name, x_T in by_token.items()},
            explained_variance=None if values_T is None else explained_variance(values_T, result.returns_T),
        )

    def choose(self, samples: list[Sample]) -> list[Handle]:
        """Let the policy loss choose tokens of a whole mini-batch, whose samples hold their current `log_probs`."""
        if self._policy_loss.select_tokens is None:
            raise RuntimeError("this policy loss chooses no tokens")
        segments = Segments.of([sample.response_length for sample in samples])
        log_probs_T, old_T, advantages_T = (
            self._flat(samples, name) for name in ("log_probs", "old_log_probs", "advantages")
        )
        batch = PolicyBatch(log_probs_T, old_T, advantages_T, segments)
        settings = policy_loss_settings(self._config.actor_rollout_ref.actor)
        return self._put(segments, self._policy_loss.select_tokens(batch, settings))

    def update(self, role: Trained, share: Share, lr: float) -> tuple[dict[str, float], StepResult]:
        """Make one optimizer step on a mini-batch, and return this rank's part of its metrics."""
        model = self._model(role)
        metrics = model.forward_backward(
            self._micro_batches(share), self._losses[role], entropy=role == "actor"
        )
        return metrics, model.step(lr)

    def memory(self) -> dict[str, int]:
        """Give memory in bytes: what is used on this host, and on this device the most since the start."""
        used = {"cpu_memory_used": psutil.virtual_memory().used}
        if self._device.type == "cuda":
            used["max_memory_allocated"] = torch.cuda.max_memory_allocated()
            used["max_memory_reserved"] = torch.cuda.max_memory_reserved()
        return used

    def close(self) -> None:
        """End the engine that lives here, which has groups of its own within the group, and leave the group."""
        if self._generator is not None:
            self._generator.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _generating(self) -> Generator:
        if self._generator is None:
            raise RuntimeError("the engines of this run live in other processes")
        return self._generator

    def _model(self, role: Role) -> TrainingBackend:
        if role not in self._models:
            raise RuntimeError(f"this run has no {role}")
        return self._models[role]

    def _flat(self, samples: Sequence[Sample], name: str) -> torch.Tensor:
        arrays = open_all(self._store, [sample.arrays[name] for sample in samples])
        return torch.from_numpy(np.concatenate(arrays))

    def _put(self, segments: Segments, x_T: torch.Tensor) -> list[Handle]:
        return put_all(self._store, [part.numpy() for part in segments.split(x_T)])

    def _micro_batches(self, share: Share) -> list[MicroBatch]:
        tokens = [
            opened if sample.response_length else _whole(sample.prompt)
            for sample, opened in zip(
                share.samples, open_all(self._store, [s.tokens for s in share.samples]), strict=True
            )
        ]
        stored = [name for name in share.arrays if name != ROLLOUT_LOG_PROBS]
        arrays = {
            name: open_all(self._store, [sample.arrays[name] for sample in share.samples]) for name in stored
        }
        if ROLLOUT_LOG_PROBS in share.arrays:
            arrays[ROLLOUT_LOG_PROBS] = [each.log_probs for each in tokens]
        return [
            make_micro_batch(
                [tokens[i] for i in positions],
                {name: [values[i] for i in positions] for name, values in arrays.items()},
                [share.weights[i] for i in positions],
                token_share=share.token_share,
                temperature=self._config.actor_rollout_ref.rollout.temperature,
                device=self._device,
            )
            if positions
            else filler(share.arrays, self._device)
            for positions in share.micro_batches
        ]


def _whole(prompt: Prompt) -> Tokens:
    """Take a sequence that was written anew for the reward model: all of it is in the prompt."""
    ids = np.asarray(prompt.ids, dtype=np.int64)
    return Tokens(ids[:-1], ids[-1:], np.zeros(1, dtype=np.float32))


def _stats(x_T: torch.Tensor) -> tuple[float, float, float]:
    return x_T.mean().item(), x_T.max().item(), x_T.min().item()
