"""The FSDP2 backend: forward, backward, clip, step, and weights by name."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from iiverl_core import activity
from iiverl_core.training import (
    AdapterWeights,
    LayoutKind,
    Loss,
    MicroBatch,
    ModelSpec,
    Outputs,
    ParallelRank,
    StepResult,
)
from iiverl_core.training.adapter import (
    adapted_layers,
    checked_merges,
    is_adapter,
    merge_adapter,
    merge_saved,
    without_adapters,
)
from iiverl_core.training.layout import WHOLE, lay_out
from iiverl_core.training.metrics import merge
from iiverl_core.training.vision import reads_images, sequence_vision
from iiverl_fsdp import checkpoint
from iiverl_fsdp.attention import attention_arguments, observe
from iiverl_fsdp.compiling import compile_blocks, compiling, rehearsals
from iiverl_fsdp.model import (
    build_empty,
    build_sharded,
    parallel_config,
    reshard,
    set_gradient_sync,
    split_joined,
    starting_weights,
    transformer,
)
from iiverl_fsdp.optimizer import make_optimizer, trained_parameters
from iiverl_fsdp.ulysses import SequenceGroup

logger = logging.getLogger(__name__)


class FSDPBackend:
    """A model sharded over all processes of the group. Each is a data-parallel rank, or `spec.sequence_split` of them are.

    It is a `PolicyModel` for actor and reference, and a `ValueModel` for critic and reward model.

    Implements `iiverl_core.training.TrainingBackend`.
    """

    def __init__(self, spec: ModelSpec) -> None:
        """Build and shard the model, and its AdamW if `spec.optim` is given."""
        split = spec.sequence_split
        self._sequence_group = SequenceGroup(split, spec.device) if split > 1 else None
        self.parallel_rank = ParallelRank(
            data_rank=dist.get_rank() // split,
            data_size=dist.get_world_size() // split,
            is_output_rank=dist.get_rank() % split == 0,
        )
        self._spec = spec
        self.layout: LayoutKind
        self._model, self.layout = build_sharded(spec)
        parallel = parallel_config(spec)
        self._syncs_once = parallel.gradient_sync == "mini_batch" and dist.get_world_size() > 1
        if parallel.compile_blocks:
            self._compile()
        self._optimizer = make_optimizer(self._model, spec.optim) if spec.optim else None
        self._saver: checkpoint.Saver | None = None  # made by the first save

    def _compile(self) -> None:
        """Compile the blocks, by running them as a training step does, and report how long that takes."""
        spec, batches = self._spec, rehearsals(self.layout, self._spec.device)
        with observe() as seen:
            self.forward(batches)
        compile_blocks(transformer(self._model), kernel=all(seen.kernels) and self._sequence_group is None)
        started = time.monotonic()
        with activity.call(f"compiling the {spec.role} model"), compiling(spec):
            for batch in batches:
                for adapter in (True, False) if spec.model.lora_rank else (True,):
                    self.forward([batch], adapter=adapter)
                    activity.advance()
                if spec.optim is not None:
                    self.forward_backward([batch], _sum)
                    activity.advance()
        self._model.zero_grad(set_to_none=True)
        reshard(self._model)
        if dist.get_rank() == 0:
            seconds = time.monotonic() - started
            logger.info("the blocks of the %s model are compiled, which took %.0f s", spec.role, seconds)

    def forward(
        self, micro_batches: Sequence[MicroBatch], *, entropy: bool = False, adapter: bool = True
    ) -> list[Outputs]:
        """See `TrainingBackend.forward`."""
        with (
            torch.no_grad(),
            nullcontext() if adapter else without_adapters(adapted_layers(self._model).values()),
        ):
            outputs = [self._run(batch, entropy=entropy) for batch in micro_batches]
        reshard(self._model)  # no backward pass does it
        return outputs

    def forward_backward(
        self,
        micro_batches: Sequence[MicroBatch],
        loss: Loss,
        *,
        entropy: bool = False,
        entropy_gradient: bool = True,
    ) -> dict[str, float]:
        """See `TrainingBackend.forward_backward`."""
        totals: dict[str, Tensor] = {}
        for batch in micro_batches:
            if self._syncs_once:
                set_gradient_sync(self._model, batch is micro_batches[-1])
            outputs = self._run(batch, entropy=entropy, entropy_gradient=entropy_gradient)
            value, metrics = loss(outputs, batch)
            # FSDP averages gradients over the processes, while the losses of all ranks add up to the batch's loss.
            (value * dist.get_world_size()).backward()
            merge(totals, metrics)
        return {name: total.item() for name, total in totals.items()}

    def step(self, lr: float) -> StepResult:
        """See `TrainingBackend.step`."""
        if self._optimizer is None:
            raise RuntimeError(f"the {self._spec.role} model was built without an optimizer")
        limit = self._spec.grad_clip if self._spec.grad_clip is not None else float("inf")
        norm = nn.utils.clip_grad_norm_([each for _, each in trained_parameters(self._model)], limit)
        grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        taken = bool(torch.isfinite(torch.tensor(grad_norm)))
        if taken:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            if self._saver is not None:
                self._saver.before_change()
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepResult(grad_norm=grad_norm, taken=taken)

    def named_weights(
        self, dtype: torch.dtype | None = None, *, adapters: AdapterWeights = "merged"
    ) -> Iterator[tuple[str, Tensor]]:
        """See `TrainingBackend.named_weights`. Tied weights come once; saved buffers are included."""
        dtypes = {name: dtype or parameter.dtype for name, parameter in self._model.named_parameters()}
        if adapters == "only":
            for name, parameter in self._model.named_parameters():
                if is_adapter(name):
                    yield name, self._full(parameter.detach().to(dtypes[name]))
            return
        weights = self._weights(dtypes, merged=adapters == "merged")
        if adapters == "merged":
            weights = checked_merges(self._model, weights, self._full)
        for name, weight in weights:
            yield from split_joined(self._model, name, weight.to(dtypes[name]))
        saved = self._model.state_dict().keys()
        for name, buffer in self._model.named_buffers():
            if name in saved:
                yield from self._whole(name, buffer.detach())

    def _weights(self, dtypes: Mapping[str, torch.dtype], *, merged: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield full parameters without adapters.

        These are omitted, or merged in fp32 or wider; all other parameters are converted before they are gathered.
        """
        layers = {f"{name}.weight": layer for name, layer in adapted_layers(self._model).items()}
        for name, parameter in self._model.named_parameters():
            if merged and name in layers:
                layer = layers[name]
                a, b = (self._full(each.weight.detach()) for each in (layer.lora_A, layer.lora_B))
                yield name, merge_adapter(self._full(parameter.detach()), a, b, layer.scale)
            elif not is_adapter(name):
                yield name, self._full(parameter.detach().to(dtypes[name]))

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrainingBackend.named_gradients`."""
        for name, parameter in trained_parameters(self._model):
            gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            yield from self._whole(name, gradient.detach())
        self._model.zero_grad(set_to_none=True)

    def _whole(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield from split_joined(self._model, name, self._full(value))

    def _full(self, value: Tensor) -> Tensor:
        value = value.to(self._spec.device)
        return value.full_tensor() if isinstance(value, DTensor) else value

    def parameter_count(self, *, trained: bool = False) -> int:
        """See `TrainingBackend.parameter_count`."""
        counted = trained_parameters(self._model) if trained else self._model.named_parameters()
        return sum(parameter.numel() for _, parameter in counted)

    def save(self, folder: Path, *, optimizer: bool = True) -> Callable[[], None]:
        """See `TrainingBackend.save`. There are no random states, since nothing draws random numbers."""
        if self._saver is None:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._saver = checkpoint.Saver(self._model, group)
        return self._saver.save(folder, self._optimizer if optimizer else None)

    def load(self, folder: Path) -> None:
        """See `TrainingBackend.load`."""
        if self._saver is not None:
            self._saver.before_change()
        checkpoint.load(folder, self._model, self._optimizer)

    @staticmethod
    def saved_weights(
        spec: ModelSpec, folder: Path, *, adapter: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """See `TrainingBackend.saved_weights`. The weights that a run with LoRA adapters started from are read at once."""
        model = build_empty(spec)
        saved = checkpoint.saved_weights(folder, model)
        if spec.model.lora_rank and not adapter:
            saved = merge_saved(starting_weights(spec), dict(saved), spec.model.lora_scale)
        for name, value in saved:
            yield from split_joined(model, name, value)

    def _run(self, batch: MicroBatch, *, entropy: bool, entropy_gradient: bool = False) -> Outputs:
        group, device = self._sequence_group, self._spec.device
        model, vision = transformer(self._model), None
        if reads_images(model.config):
            vision = [sequence_vision(model, each.token_ids, each.images) for each in batch.sequences]
        part = group.part if group else WHOLE
        layout = lay_out(batch.sequences, self.layout, device, batch.groups, part, vision)
        attention = attention_arguments(model, layout.segments, device, group)
        inputs = layout.input_ids_BL, layout.position_ids_BL
        trained = sum(sequence.trained for sequence in batch.sequences)
        if self._spec.role == "critic":
            values_T = self._model(
                *inputs, layout.rows_T, layout.columns_T, images=layout.images, **attention
            )
            return Outputs(values_T=self._gather(values_T, layout.tokens_T, trained))
        if self._spec.role == "reward":
            at = layout.last_rows_S, layout.last_columns_S
            scores_B = self._model(*inputs, *at, images=layout.images, **attention)
            return Outputs(scores_B=self._gather(scores_B, layout.sequences_S, len(batch.sequences)))
        log_probs_T, entropy_T = self._model(
            *inputs,
            layout.rows_T,
            layout.columns_T,
            layout.targets_T,
            batch.temperature,
            support=layout.support,
            entropy=entropy,
            entropy_gradient=entropy_gradient,
            images=layout.images,
            **attention,
        )
        return Outputs(
            log_probs_T=self._gather(log_probs_T, layout.tokens_T, trained),
            entropy_T=None if entropy_T is None else self._gather(entropy_T, layout.tokens_T, trained),
        )

    def _gather(self, results: Tensor, places: Tensor, count: int) -> Tensor:
        """Get the results of all parts of a row."""
        return self._sequence_group.gather(results, places, count) if self._sequence_group else results


def _sum(outputs: Outputs, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Add up what a model computes, as a loss."""
    results = outputs.values_T if outputs.log_probs_T is None else outputs.log_probs_T
    assert results is not None  # only policies and critics are trained
    return results.sum(), {}
