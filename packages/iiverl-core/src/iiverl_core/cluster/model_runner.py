"""A process's part of every model: built, run forward and updated over its rank batch."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from iiverl_core import activity
from iiverl_core.algorithms import PolicyLoss
from iiverl_core.cluster.messages import RankBatch, TokenArrays, Trained, Updated
from iiverl_core.cluster.store import Store, open_all, put_all
from iiverl_core.config import RoleConfig, RunConfig
from iiverl_core.dtypes import torch_dtype
from iiverl_core.errors import CheckpointError
from iiverl_core.registry import BACKENDS
from iiverl_core.registry.algorithms import policy_loss_info
from iiverl_core.samples import ROLLOUT_LOG_PROBS, STALENESS
from iiverl_core.training import (
    LayoutKind,
    Loss,
    MicroBatch,
    ModelSpec,
    Outputs,
    ParallelRank,
    Role,
    TrainingBackend,
)
from iiverl_core.training.batching import dummy_micro_batch, make_micro_batch
from iiverl_core.training.losses import actor_loss, critic_loss, rollout_correction
from iiverl_core.training.model_folder import describe, write_safetensors


class ModelRunner:
    """Runs models forward and backward; all processes of a group make the same calls in the same order."""

    def __init__(self, run: RunConfig, device: torch.device, store: Store, policy_loss: PolicyLoss) -> None:
        """Build the models of the run.

        Raises:
            ConfigError: the backend is not installed, or a model cannot be read.
        """
        self._run, self._device, self._store = run, device, store
        self._temperature = run.rollout.temperature
        self._models = build_models(run, device)
        self._trained: list[Role] = [role for role, each in run.roles.items() if each.training]
        self._saving: list[Callable[[], None]] = []
        # With a coefficient of 0 the entropy is only reported.
        self._entropy_gradient = run.loss.entropy_coeff != 0
        correction = rollout_correction(
            run.algorithm.rollout_correction, policy_loss_info(run.loss.policy_loss)
        )
        self._losses: dict[Trained, Loss] = {
            "actor": _counted(actor_loss(run.loss, policy_loss, correction)),
            "critic": _counted(critic_loss(run.loss)),
        }

    def parallel_ranks(self) -> Mapping[Role, ParallelRank]:
        """Return the position of this process in each model."""
        return {role: model.parallel_rank for role, model in self._models.items()}

    def parameter_counts(self) -> Mapping[Role, int]:
        """Count the parameters of each whole model."""
        return {role: model.parameter_count() for role, model in self._models.items()}

    def trained_parameter_counts(self) -> Mapping[Role, int]:
        """Count the parameters of each trained model that its optimizer updates."""
        return {role: self.model(role).parameter_count(trained=True) for role in self._trained}

    def layouts(self) -> Mapping[Role, LayoutKind]:
        """Return how each model gets its sequences."""
        return {role: model.layout for role, model in self._models.items()}

    def model(self, role: Role) -> TrainingBackend:
        """Give this process's part of a model.

        Raises:
            RuntimeError: the run has no such model.
        """
        if role not in self._models:
            raise RuntimeError(f"this run has no {role}")
        return self._models[role]

    def rollout_weights(self, *, base: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Give the actor's weights by name, in the dtype of the engines; without `base`, those of its LoRA adapters alone."""
        model, dtype = self.model("actor"), torch_dtype(self._run.rollout.dtype)
        if not self._run.syncs_adapters:
            return model.named_weights(dtype)
        adapters = model.named_weights(dtype, adapters="only")
        return chain(model.named_weights(dtype, adapters="omitted"), adapters) if base else adapters

    def evaluate(self, role: Role, batch: RankBatch) -> TokenArrays:
        """Compute log-probs under a policy, or values of the critic, for the trained tokens of each sequence.

        Only an output rank returns results.
        """
        micro_batches = self._micro_batches(batch)
        outputs = self.model(role).forward(micro_batches, adapter=not self._run.roles[role].is_base)
        if not self.model(role).parallel_rank.is_output_rank:
            return TokenArrays([], [])
        ordered = _by_sequence(
            batch,
            micro_batches,
            [each.values_T if role == "critic" else each.log_probs_T for each in outputs],
        )
        return TokenArrays(put_all(self._store, ordered), [float(array.sum()) for array in ordered])

    def score(self, batch: RankBatch) -> list[float]:
        """Score each sequence with the reward model. Only an output rank returns results."""
        outputs = self.model("reward").forward(self._micro_batches(batch))
        if not self.model("reward").parallel_rank.is_output_rank:
            return []
        scores: dict[int, float] = {}
        for positions, output in zip(batch.micro_batches, outputs, strict=True):
            if positions and output.scores_B is not None:
                scores |= dict(zip(positions, output.scores_B.tolist(), strict=True))
        return [scores[i] for i in range(len(batch.sequences))]

    def update(self, role: Trained, batch: RankBatch, lr: float) -> Updated:
        """Make one optimizer step on a mini-batch."""
        model, micro_batches, loss = self.model(role), self._micro_batches(batch), self._losses[role]
        kept: dict[int, Tensor] = {}  # by the identity of a micro-batch

        def keeping(outputs: Outputs, micro_batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
            if outputs.log_probs_T is not None:
                kept[id(micro_batch)] = outputs.log_probs_T.detach()
            return loss(outputs, micro_batch)

        metrics = model.forward_backward(
            micro_batches,
            keeping if batch.keeps_log_probs else loss,
            entropy=role == "actor",
            entropy_gradient=self._entropy_gradient,
        )
        updated = Updated(metrics, model.step(lr))
        if kept and model.parallel_rank.is_output_rank:
            log_probs = _by_sequence(batch, micro_batches, [kept.get(id(each)) for each in micro_batches])
            updated.log_probs.extend(put_all(self._store, log_probs))
        return updated

    def begin_save(self, folder: Path) -> None:
        """Copy the trained models, and write the copies into a folder per model in the background.

        Raises:
            CheckpointError: `folder` cannot be written to.
        """
        contents = self._run.checkpoint.save_contents
        # Gathered first: until nothing is being written, which would hold up all processes at every tensor.
        if "hf_model" in contents:
            first = dist.get_rank() == 0
            exported = folder / "actor" / "huggingface"
            self._saving.append(write_safetensors(self.model("actor").named_weights(), exported, write=first))
            if first:
                thread = ThreadPoolExecutor(1, thread_name_prefix="description")
                self._saving.append(thread.submit(self._write_description, exported).result)
                thread.shutdown(wait=False)
        if "model" in contents:
            optimizer = "optimizer" in contents
            self._saving += [
                self.model(role).save(folder / role, optimizer=optimizer) for role in self._trained
            ]

    def finish_save(self) -> None:
        """Wait until all processes have written.

        Raises:
            CheckpointError: one could not.
        """
        saving, self._saving = self._saving, []
        try:
            for wait in saving:
                wait()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write the actor for transformers: {error}") from error

    @cached_property
    def _description(self) -> dict[str, bytes]:
        """What belongs to the actor's weights; it does not change, and takes transformers a while."""
        return describe(self._run, "actor")

    def _write_description(self, folder: Path) -> None:
        for name, content in self._description.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    def load(self, folder: Path) -> None:
        """Take over the trained models that `begin_save` wrote, in any layout.

        Raises:
            CheckpointError: they are not whole, or of other models.
        """
        for role in self._trained:
            self.model(role).load(folder / role)

    def _micro_batches(self, batch: RankBatch) -> list[MicroBatch]:
        sequences = open_all(self._store, [sequence.tokens for sequence in batch.sequences])
        stored = [name for name in batch.arrays if name != ROLLOUT_LOG_PROBS]
        arrays = {
            name: open_all(self._store, [sequence.arrays[name] for sequence in batch.sequences])
            for name in stored
        }
        if ROLLOUT_LOG_PROBS in batch.arrays:
            arrays[ROLLOUT_LOG_PROBS] = [each.trained_log_probs for each in sequences]
        if batch.staleness:
            arrays[STALENESS] = [
                np.repeat(*np.array(runs).T).astype(np.float32)  # steps, and the number of tokens
                for runs in batch.staleness
            ]
        return [
            make_micro_batch(
                [sequences[i] for i in positions],
                {name: [values[i] for i in positions] for name, values in arrays.items()},
                [batch.weights[i] for i in positions] if batch.weights else [],
                inv_num_tokens=batch.inv_num_tokens,
                temperature=self._temperature,
                groups=[batch.sequences[i].shared for i in positions],
                tokens_by_staleness=batch.tokens_by_staleness,
                device=self._device,
            )
            if positions
            else dummy_micro_batch(batch.arrays, self._device)
            for positions in batch.micro_batches
        ]


def _by_sequence(
    batch: RankBatch, micro_batches: Sequence[MicroBatch], values: Sequence[Tensor | None]
) -> list[np.ndarray]:
    """Take numbers per trained token of micro-batches apart, into an array (trained,) fp32 for each sequence of a batch."""
    arrays: dict[int, np.ndarray] = {}
    for positions, micro_batch, x_T in zip(batch.micro_batches, micro_batches, values, strict=True):
        if positions and x_T is not None:
            parts = micro_batch.segments.split(x_T.float().cpu())
            arrays |= {i: part.numpy() for i, part in zip(positions, parts, strict=True)}
    return [arrays[i] for i in range(len(batch.sequences))]


def _counted(loss: Loss) -> Loss:
    """Count every micro-batch as progress."""

    def counted(outputs: Outputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        activity.advance()
        return loss(outputs, batch)

    return counted


def build_models(run: RunConfig, device: torch.device) -> dict[Role, TrainingBackend]:
    """Build this process's part of every model of the run, always in the same order.

    Raises:
        ConfigError: the backend is not installed, or a model cannot be read.
    """
    backend: type[TrainingBackend] = BACKENDS[run.backend].load()
    models: dict[Role, TrainingBackend] = {}
    for name, role in run.roles.items():
        if role.is_base:
            models[name] = models["actor"]
            continue
        if role.model.external_lib:
            importlib.import_module(role.model.external_lib)
        models[name] = backend(model_spec(role, device))
    return models


def model_spec(role: RoleConfig, device: torch.device) -> ModelSpec:
    """Collect what a backend needs to build a model."""
    training = role.training
    return ModelSpec(
        role=role.role,
        model=role.model,
        parallel=role.parallel,
        device=device,
        default_dtype=role.default_dtype,
        optim=training.optimizer if training else None,
        grad_clip=training.grad_clip if training else None,
        offload=role.offload,
        sequence_split=role.sequence_split,
        weights=role.weights,
        freeze_vision_tower=role.freeze_vision_tower,
    )
