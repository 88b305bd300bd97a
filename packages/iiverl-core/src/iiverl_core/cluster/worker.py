"""The process on a device: its share of the actor and of the reference, and a rollout engine with its own weights.

All workers of a group get the same calls in the same order, each with its own arguments. A call takes and returns
small things; token arrays stay in the store and are named by handles.
"""

import importlib
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
import torch.distributed as dist
from transformers.utils.logging import disable_progress_bar

from iiverl_core.algorithms import ADVANTAGES, AdvantageBatch, AdvantageSettings, Segments, kl_divergence
from iiverl_core.cluster.store import Store, open_all, put_all
from iiverl_core.config import ActorConfig, Config, RefConfig
from iiverl_core.data import load_tokenizer
from iiverl_core.rollout import Completion, Request, make_engine, sampling_params
from iiverl_core.samples import Handle, Prompt, Sample, Tokens
from iiverl_core.training import MicroBatch, ModelSpec, Place, Role, StepResult, TrainingBackend
from iiverl_core.training.batching import filler, make_micro_batch
from iiverl_core.training.losses import actor_loss
from iiverl_core.training.registry import load_backend

STREAM_SECONDS = 0.1  # how long finished samples may wait for others that leave with them


@dataclass(frozen=True)
class WorkerInfo:
    """What the controller needs to know of a worker; `parameters` is the size of the whole actor."""

    rank: int
    host: str
    pid: int
    device: str
    place: Place
    parameters: int


@dataclass(frozen=True)
class LogProbs:
    """Per-token log-probs of some samples: a handle to each (R,) fp32 array, and each array's sum, in nats."""

    handles: list[Handle]
    sums: list[float]


@dataclass(frozen=True)
class Advantages:
    """Advantages of a step's samples.

    A handle to each (R,) fp32 array and its mean; `rewards` after the KL penalty, one a sample; `kl`, the mean over
    samples of the mean over tokens of the KL in the reward, before its coefficient; `token_stats`, mean, maximum and minimum over all tokens of `advantages` and `returns`.
    """

    handles: list[Handle]
    means: list[float]
    rewards: list[float]
    kl: float
    token_stats: dict[str, tuple[float, float, float]]


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

    def address(self, host: str) -> str:
        """Give the place where the group's processes can meet: a free port of this process's machine, `host`."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def setup(self, meeting_point: str) -> WorkerInfo:
        """Join the others, and build the models and the engine.

        Raises:
            ConfigError: the backend is not installed, or a model or tokenizer cannot be read.
        """
        config = self._config.actor_rollout_ref
        disable_progress_bar()  # the run shows its own, and every worker's would be one too many
        if config.model.external_lib:
            importlib.import_module(config.model.external_lib)
        if not dist.is_initialized():
            kind = "cpu:gloo,cuda:nccl" if self._device.type == "cuda" else "gloo"
            dist.init_process_group(kind, init_method=meeting_point, rank=self._rank, world_size=self._size)
        backend = load_backend(self._config.backend)
        self._actor = backend(self._spec(config.actor, "actor"))
        self._reference = (
            backend(self._spec(config.ref, "reference")) if self._config.needs_reference else None
        )
        self._loss = actor_loss(config.actor)
        self._tokenizer = load_tokenizer(self._config)
        self._engine = make_engine(self._config, self._device)
        return WorkerInfo(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=torch.cuda.get_device_name() if self._device.type == "cuda" else "cpu",
            place=self._actor.place,
            parameters=self._actor.parameter_count(),
        )

    def _spec(self, section: ActorConfig | RefConfig, role: Role) -> ModelSpec:
        megatron = self._config.backend == "megatron"
        return ModelSpec(
            role=role,
            model=self._config.actor_rollout_ref.model,
            parallel=section.megatron if megatron else section.fsdp_config,
            device=self._device,
            default_dtype="fp32" if role == "actor" else "bf16",
            optim=section.optim if isinstance(section, ActorConfig) else None,
            grad_clip=_grad_clip(section, megatron=megatron) if isinstance(section, ActorConfig) else None,
        )

    def update_rollout_weights(self, version: int) -> None:
        """Give the engine the actor's weights."""
        self._engine.update_weights(self._actor.named_weights(), version)

    def generate(self, prompts: Sequence[tuple[int, Prompt, int]], validate: bool) -> Iterator[list[Sample]]:
        """Answer prompts, each given with its group and its seed; yield samples as they finish, a few at a time."""
        params = sampling_params(self._config, validate=validate)
        by_group = {group: prompt for group, prompt, _ in prompts}
        requests = [Request(key=group, prompt_ids=prompt.ids, seed=seed) for group, prompt, seed in prompts]
        finished: list[Completion] = []
        tokens: list[Tokens] = []
        last = time.monotonic()
        for done in self._engine.generate(requests, params):
            finished.append(done)
            tokens.append(
                Tokens(
                    prompt_ids=np.asarray(by_group[done.key].ids, dtype=np.int64),
                    response_ids=done.token_ids,
                    log_probs=done.log_probs,
                )
            )
            if time.monotonic() - last > STREAM_SECONDS:
                yield self._as_samples(finished, tokens, by_group)
                finished, tokens = [], []
                last = time.monotonic()
        if finished:
            yield self._as_samples(finished, tokens, by_group)

    def _as_samples(
        self, finished: Sequence[Completion], tokens: list[Tokens], prompts: Mapping[int, Prompt]
    ) -> list[Sample]:
        ids = [done.token_ids.tolist() for done in finished]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        raw_texts = self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        return [
            Sample(
                prompt=prompts[done.key],
                group=done.key,
                member=done.member,
                text=text,
                raw_text=raw_text,
                response_length=len(done.token_ids),
                finish_reason=done.finish_reason,
                weights_version=done.weights_version,
                log_prob=float(done.log_probs.sum()),
                tokens=handle,
            )
            for done, text, raw_text, handle in zip(
                finished, texts, raw_texts, put_all(self._store, tokens), strict=True
            )
        ]

    def log_probs(self, model: str, share: Share) -> LogProbs:
        """Log-probs of the responses under the `actor` or the `reference`, in the order of `share.samples`."""
        micro_batches = self._micro_batches(share)
        outputs = self._model(model).forward(micro_batches)
        arrays: dict[int, np.ndarray] = {}
        for positions, batch, output in zip(share.micro_batches, micro_batches, outputs, strict=True):
            if positions and output.log_probs_T is not None:
                parts = batch.segments.split(output.log_probs_T.float().cpu())
                arrays |= {i: part.numpy() for i, part in zip(positions, parts, strict=True)}
        ordered = [arrays[i] for i in range(len(share.samples))]
        return LogProbs(put_all(self._store, ordered), [float(array.sum()) for array in ordered])

    def advantages(self, samples: list[Sample], scores: list[float], kl_coef: float) -> Advantages:
        """Compute the advantages of a whole step's samples, which all have a score; `kl_coef` 0 is no KL in the reward."""
        segments = Segments.of([sample.response_length for sample in samples])
        rewards_T = segments.at_last(torch.tensor(scores))
        kl_T = torch.zeros_like(rewards_T)
        if kl_coef:
            old_T, ref_T = (self._flat(samples, name) for name in ("old_log_probs", "ref_log_probs"))
            kl_T = kl_divergence(self._config.algorithm.kl_penalty, old_T, ref_T)
            rewards_T = rewards_T - kl_coef * kl_T
        number = {group: i for i, group in enumerate(dict.fromkeys(sample.group for sample in samples))}
        group_B = torch.tensor([number[sample.group] for sample in samples])
        algorithm = self._config.algorithm
        advantages_T, returns_T = ADVANTAGES[algorithm.adv_estimator](
            AdvantageBatch(rewards_T, segments, group_B),
            AdvantageSettings(norm_by_std=algorithm.norm_adv_by_std_in_grpo),
        )
        return Advantages(
            handles=put_all(self._store, [part.numpy() for part in segments.split(advantages_T)]),
            means=segments.mean(advantages_T).tolist(),
            rewards=segments.sum(rewards_T).tolist(),
            kl=segments.mean(kl_T).mean().item(),
            token_stats={"advantages": _stats(advantages_T), "returns": _stats(returns_T)},
        )

    def update_actor(self, share: Share, lr: float) -> tuple[dict[str, float], StepResult]:
        """Make one optimizer step on a mini-batch, and return this rank's part of its metrics."""
        metrics = self._actor.forward_backward(self._micro_batches(share), self._loss, entropy=True)
        return metrics, self._actor.step(lr)

    def memory(self) -> dict[str, int]:
        """Give memory in bytes: what is used on this host, and on this device the most since the start."""
        used = {"cpu_memory_used": psutil.virtual_memory().used}
        if self._device.type == "cuda":
            used["max_memory_allocated"] = torch.cuda.max_memory_allocated()
            used["max_memory_reserved"] = torch.cuda.max_memory_reserved()
        return used

    def close(self) -> None:
        """Leave the group."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _model(self, name: str) -> TrainingBackend:
        model = self._actor if name == "actor" else self._reference
        if model is None:
            raise RuntimeError(f"this run has no {name}")
        return model

    def _flat(self, samples: Sequence[Sample], name: str) -> torch.Tensor:
        arrays = open_all(self._store, [sample.arrays[name] for sample in samples])
        return torch.from_numpy(np.concatenate(arrays))

    def _micro_batches(self, share: Share) -> list[MicroBatch]:
        tokens = open_all(self._store, [sample.tokens for sample in share.samples])
        arrays = {
            name: open_all(self._store, [sample.arrays[name] for sample in share.samples])
            for name in share.arrays
        }
        temperature = self._config.actor_rollout_ref.rollout.temperature
        return [
            make_micro_batch(
                [tokens[i] for i in positions],
                {name: [values[i] for i in positions] for name, values in arrays.items()},
                [share.weights[i] for i in positions],
                token_share=share.token_share,
                temperature=temperature,
                device=self._device,
            )
            if positions
            else filler(share.arrays, self._device)
            for positions in share.micro_batches
        ]


def _grad_clip(actor: ActorConfig, *, megatron: bool) -> float | None:
    """Read the limit from where each backend's files have it."""
    return actor.optim.clip_grad if megatron else actor.grad_clip


def _stats(x_T: torch.Tensor) -> tuple[float, float, float]:
    return x_T.mean().item(), x_T.max().item(), x_T.min().item()
