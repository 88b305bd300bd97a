"""The Megatron backend: forward and backward through a pipeline, step, and weights by name."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import iiverl_megatron.environment  # noqa: F401  # isort: skip  (before megatron-core)
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from iiverl_core.config import MegatronConfig
from iiverl_core.training import AdapterWeights, LayoutKind, Loss, MicroBatch, ModelSpec, Outputs, StepResult
from iiverl_core.training.adapter import is_adapter, without_adapters
from iiverl_core.training.batching import dummy_micro_batch
from iiverl_core.training.metrics import merge
from iiverl_megatron import checkpoint
from iiverl_megatron.adapters import adapted_layers, checked_merges
from iiverl_megatron.architecture import Architecture, read_architecture
from iiverl_megatron.context import gather_tokens
from iiverl_megatron.heads import Targets
from iiverl_megatron.inputs import Inputs, Sharing, make_inputs
from iiverl_megatron.layers import own_attention
from iiverl_megatron.model import build_chunks, distribute
from iiverl_megatron.names import WeightMapping
from iiverl_megatron.offload import Offloading
from iiverl_megatron.optimizer import make_optimizer, step
from iiverl_megatron.parallel import context_group, init_parallel, parallel_rank, tensor_group
from iiverl_megatron.saved_weights import saved_weights
from iiverl_megatron.weights import count_parameters, global_parameters, read_weights, whole_tensors

logger = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")


def _in_compute_context(
    method: Callable[Concatenate["MegatronBackend", P], T],
) -> Callable[Concatenate["MegatronBackend", P], T]:
    """Run a method within `_compute_context`."""

    @wraps(method)
    def inside(self: "MegatronBackend", *args: P.args, **kwargs: P.kwargs) -> T:
        with _compute_context(self._spec):
            return method(self, *args, **kwargs)

    return inside


class MegatronBackend:
    """A model that is split over the processes according to its section `megatron`.

    Implements `iiverl_core.training.TrainingBackend`.
    """

    layout: LayoutKind

    def __init__(self, spec: ModelSpec) -> None:
        """Build this process's part of the model, and its AdamW if `spec.optim` is given."""
        if not isinstance(spec.parallel, MegatronConfig):
            raise TypeError(f"Megatron reads the section megatron, not {type(spec.parallel).__name__}")
        self._spec = spec
        with _compute_context(self._spec):
            init_parallel(spec.parallel)
            self.parallel_rank = parallel_rank()
            self._sharing = Sharing(
                tensor=tensor_group().size(),
                context=context_group().size(),
                context_rank=context_group().rank(),
            )
            self._architecture = read_architecture(spec, spec.parallel)
            self.layout = _choose_layout(spec, self._architecture, self._sharing)
            self._models = build_chunks(spec, spec.parallel, self._architecture)
            read_weights(spec, self._models, self._architecture)
            self._layers = adapted_layers(self._models)
            self._chunks: list[Any] = list(self._models)
            self._optimizer = None
            if spec.optim is None:
                for model in self._models:
                    model.requires_grad_(False)
            else:
                self._chunks = [distribute(model) for model in self._models]
                self._optimizer = make_optimizer(self._chunks, spec.optim)
            self._offloading = Offloading(
                spec.offload, self._chunks, self._optimizer, spec.device, partial(_compute_context, spec)
            )

    @_in_compute_context
    def forward(
        self, micro_batches: Sequence[MicroBatch], *, entropy: bool = False, adapter: bool = True
    ) -> list[Outputs]:
        """See `TrainingBackend.forward`. Outputs are empty outside of the last pipeline stage."""
        adapters = [] if adapter else [layer.adapters for layer in self._layers.values()]
        with torch.no_grad(), self._offloading.parameters(), without_adapters(adapters):
            results = self._run(micro_batches, entropy, loss=None)
        return results or [Outputs() for _ in micro_batches]

    @_in_compute_context
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
        self._offloading.allocate_gradients()
        with self._offloading.parameters():
            for metrics in self._run(micro_batches, entropy, loss, entropy_gradient=entropy_gradient):
                merge(totals, metrics)
        return {name: total.item() for name, total in totals.items()}

    @_in_compute_context
    def step(self, lr: float) -> StepResult:
        """See `TrainingBackend.step`."""
        if self._optimizer is None:
            raise RuntimeError(f"the {self._spec.role} model was built without an optimizer")
        with self._offloading.parameters(), self._offloading.optimizer():
            result = step(self._chunks, self._optimizer, lr, self._spec.grad_clip)
        self._offloading.free_gradients()
        return result

    def named_weights(
        self, dtype: torch.dtype | None = None, *, adapters: AdapterWeights = "merged"
    ) -> Iterator[tuple[str, Tensor]]:
        """See `TrainingBackend.named_weights`. Tied weights come once."""
        with self._offloading.parameters():
            own = {name: each.data for name, each in global_parameters(self._models).items()}
            if adapters == "merged" and self._spec.model.lora_rank:
                context = partial(_compute_context, self._spec)
                scale = self._spec.model.lora_scale
                yield from checked_merges(self._layers, self._whole(own), scale, dtype, context)
                return
            kept = {name: each for name, each in own.items() if is_adapter(name) == (adapters == "only")}
            for _, mapping, tensors in self._whole(kept, dtype):
                yield from zip(mapping.names, tensors, strict=True)

    def _whole(
        self, own: Mapping[str, Tensor], dtype: torch.dtype | None = None
    ) -> Iterator[tuple[str, WeightMapping, list[Tensor]]]:
        return whole_tensors(own, self._architecture, self._spec.role, self._spec.device, dtype)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """See `TrainingBackend.named_gradients`."""
        with _compute_context(self._spec), self._offloading.parameters():
            self._offloading.allocate_gradients()
            finalize_model_grads(self._chunks, force_all_reduce=True)
            gradients = {
                name: getattr(each, "main_grad")  # noqa: B009 (set by megatron-core's buffers)
                for name, each in self._trained().items()
            }
            for _, mapping, tensors in self._whole(gradients):
                yield from zip(mapping.names, tensors, strict=True)
            for chunk in self._chunks:
                chunk.zero_grad_buffer()
            self._offloading.free_gradients()

    def parameter_count(self, *, trained: bool = False) -> int:
        """See `TrainingBackend.parameter_count`; tied weights count once."""
        counted = self._trained() if trained else global_parameters(self._models)
        return count_parameters(counted, self._architecture, self._spec.role)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: each for name, each in global_parameters(self._models).items() if each.requires_grad}

    @_in_compute_context
    def save(self, folder: Path, *, optimizer: bool = True) -> Callable[[], None]:
        """See `TrainingBackend.save`."""
        with self._offloading.parameters(), self._offloading.optimizer():
            wait = checkpoint.save(folder, self._chunks, self._optimizer if optimizer else None)

        def wait_in_context() -> None:
            with _compute_context(self._spec):
                wait()

        return wait_in_context

    @_in_compute_context
    def load(self, folder: Path) -> None:
        """See `TrainingBackend.load`."""
        with self._offloading.parameters(), self._offloading.optimizer():
            checkpoint.load(folder, self._chunks, self._optimizer)

    @staticmethod
    def saved_weights(
        spec: ModelSpec, folder: Path, *, adapter: bool = False
    ) -> Iterator[tuple[str, Tensor]]:
        """See `TrainingBackend.saved_weights`. The weights that a run with LoRA adapters started from are read one at a time."""
        if not isinstance(spec.parallel, MegatronConfig):
            raise TypeError(f"Megatron reads the section megatron, not {type(spec.parallel).__name__}")
        with _compute_context(spec):
            yield from saved_weights(spec, spec.parallel, folder, adapter=adapter)

    def _run(
        self,
        micro_batches: Sequence[MicroBatch],
        entropy: bool,
        loss: Loss | None,
        *,
        entropy_gradient: bool = False,
    ) -> list[Any]:
        """Run micro-batches through the pipeline; the last stage returns their outputs, or with a loss its metrics."""
        batches = list(micro_batches)
        chunks: list[Any] = self._chunks if loss is not None else [*self._models]
        if len(chunks) > 1:
            # Interleaved stages need a number of micro-batches that their own number divides.
            short = -len(batches) % parallel_state.get_pipeline_model_parallel_world_size()
            batches += [dummy_micro_batch(tuple(batches[0].arrays_T), self._spec.device)] * short
        inputs = [self._inputs(batch) for batch in batches]
        finish = [
            partial(self._finish, batch, each, loss) for batch, each in zip(batches, inputs, strict=True)
        ]
        targets = [
            Targets(each.targets_T, batch.temperature, entropy, entropy_gradient, each.support)
            for batch, each in zip(batches, inputs, strict=True)
        ]
        results = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=[iter(zip(inputs, targets, finish, strict=True)) for _ in chunks],
            model=chunks,
            num_microbatches=len(batches),
            seq_length=1,  # each micro-batch has its own
            micro_batch_size=1,
            forward_only=loss is None,
            collect_non_loss_data=loss is None,
        )
        return results[: len(micro_batches)]

    def _forward_step(self, data: Iterator[tuple[Inputs, Targets, Any]], chunk: Any) -> tuple[Tensor, Any]:
        """Run one chunk over the next micro-batch."""
        inputs, targets, finish = next(data)
        model = getattr(chunk, "module", chunk)
        with model.output_layer.at(inputs.positions, targets) if model.post_process else nullcontext():
            output = chunk(
                input_ids=inputs.input_ids_BL,
                position_ids=inputs.position_ids_BL,
                attention_mask=None,
                packed_seq_params=inputs.packed,
            )
        return output, finish

    def _finish(
        self,
        batch: MicroBatch,
        inputs: Inputs,
        loss: Loss | None,
        output: Tensor,
        non_loss_data: bool = False,
    ) -> Any:
        """Convert the last chunk's output to `Outputs`, or with a loss to its value, no token count, and metrics."""
        outputs = self._outputs(output[0], inputs)
        if loss is None:
            return outputs
        value, metrics = loss(outputs, batch)
        return value, torch.zeros((), dtype=torch.int, device=value.device), metrics

    def _outputs(self, head_NK: Tensor, inputs: Inputs) -> Outputs:
        """Name the columns of the head's output, those of all context-parallel processes."""
        columns = [
            column_N
            if self._sharing.context == 1
            else gather_tokens(column_N, inputs.local_N, context_group())
            for column_N in head_NK.unbind(-1)
        ]
        if self._spec.role == "critic":
            return Outputs(values_T=columns[0])
        if self._spec.role == "reward":
            return Outputs(scores_B=columns[0])
        return Outputs(log_probs_T=columns[0], entropy_T=columns[1] if len(columns) > 1 else None)

    def _inputs(self, batch: MicroBatch) -> Inputs:
        return make_inputs(
            batch,
            self._spec.role,
            self.layout,
            sharing=self._sharing,
            device=self._spec.device,
        )


def _choose_layout(spec: ModelSpec, architecture: Architecture, sharing: Sharing) -> LayoutKind:
    """Choose the layout of a model's inputs, and report once if it keeps prompts from being shared."""
    if spec.model.use_remove_padding is False:
        return "padded"
    layout, reason = "shared", ""
    if sharing.context > 1:
        layout, reason = "padded", "context parallelism divides rows, which are padded"
    elif not own_attention(architecture.transformer):
        layout, reason = (
            "packed",
            "Transformer Engine's attention takes packed sequences without common parts",
        )
    if reason and dist.get_rank() == 0:
        logger.warning("the %s model computes a prompt for each response to it: %s", spec.role, reason)
    return layout


def _compute_context(spec: ModelSpec) -> AbstractContextManager[None]:
    """Let megatron-core compute on the CPU if that is the model's device."""
    if spec.device.type == "cuda":
        return nullcontext()
    from iiverl_megatron.cpu import on_cpu

    return on_cpu()
