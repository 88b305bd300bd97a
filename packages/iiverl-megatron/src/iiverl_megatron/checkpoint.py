"""Save and load weights, optimizer and random states, each process its part, for any layout.

The files are those of megatron-core's `dist_checkpointing`, which names every slice by its place in the whole tensor.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from iiverl_core.errors import CheckpointError
from iiverl_core.training.adapter import is_adapter
from iiverl_megatron.optimizer import fuse
from iiverl_megatron.parallel import parallel_sizes
from iiverl_megatron.weights import global_name

OPTIMIZER = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}
"""Shard the optimizer's state like its parameters, so that it can be read in another layout."""

EXTRA = "_extra_state"
"""Suffix of the states that Transformer Engine keeps for fp8, which is not used."""
REFUSED = (CheckpointingException, CheckpointException, KeyError, OSError, RuntimeError, ValueError)
"""Raised by the libraries for files that are missing, broken or of another model."""


def save(folder: Path, chunks: Sequence[Any], optimizer: Any) -> Callable[[], None]:
    """Copy a model's state, and write it into `folder`, which is made, in the background; all processes take part.

    Returns:
        A function that waits for the files of all processes, and raises CheckpointError if some cannot be written. All
        processes call it at the same place, since they agree in it that all is written.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    state = _sharded(chunks, optimizer, loading=False)
    state |= {"drawn_in": _drawn_in(chunks), "rng": _random_states()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # megatron-core would have one queue of results for all saves of a process, in a process of its own.
        with patch.object(filesystem_async, "_get_write_results_queue", Queue):
            request = dist_checkpointing.save(state, str(folder), async_sharded_save=True)
    except REFUSED as error:
        raise CheckpointError(f"cannot write a checkpoint to {folder}: {error}") from error
    assert request is not None
    writing = None
    if request.preload_fn is not None:  # this process has something to write
        write: Any = request.async_fn
        transforms, *_ = write.args
        _, originals, results = request.async_fn_args
        threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        copies = _copied(request.preload_fn(), originals)
        writing = threads.submit(_write, transforms, copies, results)
        threads.shutdown(wait=False)

    def wait() -> None:
        try:
            if writing is not None:
                writing.result()
            dist.barrier()
            for finish in request.finalize_fns:
                finish()
        except REFUSED as error:
            raise CheckpointError(f"cannot write a checkpoint to {folder}: {error}") from error

    return wait


def _copied(buckets: Sequence[Any], originals: Sequence[Any]) -> list[Any]:
    """Copy what megatron-core has not copied off a device: from a CPU, it writes the very tensors that training goes on with."""
    return [
        (
            *where,
            (
                data,
                [
                    (item, tensor.clone() if original.is_cpu else tensor)
                    for (item, tensor), (_, original) in zip(tensors, sources, strict=True)
                ],
            ),
        )
        for (*where, (data, tensors)), (*_, (_, sources)) in zip(buckets, originals, strict=True)
    ]


def _write(transforms: Any, buckets: Sequence[Any], results: Queue[Any]) -> None:
    """Write this process's files, and put their entries, or what went wrong, where megatron-core looks for them.

    It would fork a process for each file, and forking a process in which training goes on can deadlock.
    """
    found: dict[int, Any] = {}
    for i, bucket in enumerate(buckets):
        written: Any = Queue()  # it asks for the queues of processes, and uses what all queues have
        begun: Any = Queue()
        begun.put(i)
        FileSystemWriterAsync.write_preloaded_data(transforms, i, bucket, written, begun, True)
        _, entries = written.get()
        if isinstance(entries, Exception):
            results.put(entries)
            return
        found[i] = entries
    results.put(found)


def load(folder: Path, chunks: Sequence[Any], optimizer: Any) -> None:
    """Load a model from `folder`; random states only if the kind of device and the layout are the same.

    Raises:
        CheckpointError: there is no checkpoint of this model.
    """
    try:
        saved = dist_checkpointing.load_common_state_dict(str(folder))
        state = _sharded(chunks, optimizer, loading=True)
        if same := saved["drawn_in"] == _drawn_in(chunks):
            state["rng"] = _random_states()
        found: Any = dist_checkpointing.load(state, str(folder))
    except REFUSED as error:
        raise CheckpointError(f"{folder} holds no checkpoint of this model: {error}") from error
    for i, chunk in enumerate(chunks):
        read = getattr(chunk, "module", chunk).load_state_dict(found[f"model{i}"], strict=False)
        if missing := [name for name in read.missing_keys if name in state[f"model{i}"]]:
            raise CheckpointError(f"{folder} lacks {', '.join(missing)}")
    if optimizer is not None:
        with _keeping_steps():
            optimizer.load_state_dict(found["optimizer"])
        for part in optimizer.chained_optimizers:
            _complete(part.optimizer)
    if same:
        torch.set_rng_state(found["rng"]["cpu"])
        torch.cuda.set_rng_state(found["rng"]["device"])
        _tracker().set_states(found["rng"]["tracker"])


@contextmanager
def _keeping_steps() -> Iterator[None]:
    """Keep AdamW's step numbers while optimizer states are loaded.

    torch's AdamW has a step number per parameter, a checkpoint has one for all, which is loaded by then; megatron-core
    0.16 expects it with each parameter's tensors.
    """
    fill = DistributedOptimizer._set_main_param_and_optimizer_states

    def filled(self: Any, parameter: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, position = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][position]]
        fill(self, parameter, {**tensors, "step": state["step"]} if "step" in state else tensors)

    with patch.object(DistributedOptimizer, "_set_main_param_and_optimizer_states", filled):
        yield


def _begin(part: Any) -> None:
    """Create the state of an optimizer that has made no step.

    megatron-core cannot save or load it without state, and the state that it creates lacks AdamW's step number.
    """
    optimizer = part.optimizer
    part.init_state_fn(optimizer)
    if isinstance(optimizer, torch.optim.AdamW):
        for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
            step = torch.zeros((), dtype=torch.float32, device=parameter.device)
            optimizer.state[parameter].setdefault("step", step)


def _complete(optimizer: torch.optim.Optimizer) -> None:
    """Complete an optimizer that megatron-core has loaded.

    Its parameters share one step tensor, which each would increment, on the CPU, and its groups have only the settings of
    the optimizer that saved them, torch's or apex's.
    """
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = state["step"].to(parameter.device, torch.float32, copy=True)
    for group in optimizer.param_groups:
        for name, value in optimizer.defaults.items():
            group.setdefault(name, value)
    fuse(optimizer)


def _sharded(chunks: Sequence[Any], optimizer: Any, *, loading: bool) -> dict[str, Any]:
    """Return this process's slices with their places in the whole tensors."""
    state: dict[str, Any] = {
        f"model{i}": sharded_weights(getattr(chunk, "module", chunk)) for i, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        for part in optimizer.chained_optimizers:
            _begin(part)
        whole = state if len(chunks) > 1 else state["model0"]
        state["optimizer"] = optimizer.sharded_state_dict(whole, is_loading=loading, metadata=_metadata())
    return state


def sharded_weights(chunk: GPTModel) -> dict[str, Any]:
    """Return the trained parameters of a chunk by name, with their places in the saved tensors."""
    tensors = chunk.sharded_state_dict(metadata=_metadata())
    own = {name: part for name, part in tensors.items() if not name.endswith(EXTRA)}
    parameters = dict(chunk.named_parameters())
    adapters = {
        name: _adapter_place(name, each, chunk) for name, each in parameters.items() if is_adapter(name)
    }
    if not adapters:
        return own
    return {name: part for name, part in own.items() if parameters[name].requires_grad} | adapters


def _adapter_place(name: str, parameter: torch.nn.Parameter, chunk: GPTModel) -> Any:
    key = global_name(name, chunk)
    if not getattr(parameter, "tensor_model_parallel", False):
        return make_sharded_tensor_for_checkpoint(parameter, key)
    return make_tp_sharded_tensor_for_checkpoint(parameter, key, tp_axis=parameter.partition_dim)  # type: ignore[attr-defined]


def _metadata() -> dict[str, Any]:
    return {**OPTIMIZER, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _drawn_in(chunks: Sequence[Any]) -> tuple[Any, ...]:
    """Return what random states depend on: the kind of device, and the layout."""
    return next(chunks[0].parameters()).device.type, *parallel_sizes()


def _tracker() -> Any:
    return get_cuda_rng_tracker()


def _random_states() -> ShardedObject:
    """Return this process's random states; equal on all data-parallel ranks, so one of them writes them."""
    states = {
        "cpu": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": _tracker().get_states(),
    }
    tensor, pipeline, *_ = parallel_sizes()
    here = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
    )
    copy = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    return ShardedObject("rng", states, (pipeline, tensor), here, replica_id=copy)
