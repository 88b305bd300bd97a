"""Save and load weights and optimizer states, each process its shards, for any number of processes.

The files are those of `torch.distributed.checkpoint`, which records each shard's place in the whole tensor. Tensors are
named after the model's parameters, whatever their sharding. There are no random states, since dropout is off.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from iiverl_core.errors import CheckpointError
from iiverl_core.training.saved_tensors import SavedTensors
from iiverl_fsdp.host_copies import HostCopies
from iiverl_fsdp.optimizer import forget, trained_parameters

MODEL, OPTIMIZER = "model.", "optimizer."  # prefixes of names
KIND = "optimizer"  # the entry that says which optimizer it is


class _CopiedState(DefaultSavePlanner):
    """Writes copies of tensors by a plan for the tensors themselves."""

    def __init__(self, local_plan: SavePlan, copies: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._local_plan = local_plan
        self._copies = copies

    def create_local_plan(self) -> SavePlan:
        """Return the plan of this process."""
        return self._local_plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return the copy of an entry."""
        return self._copies[index.fqn]


class Saver:
    """Saves a model again and again; where each shard belongs is found out once.

    `group` is of all processes, on CPUs, and for this alone: its collectives must not meet those of training.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup) -> None:
        self._model, self._group = model, group
        self._plans: dict[tuple[str, ...], SavePlan] = {}  # by the names of what is saved
        self._copies = HostCopies()
        self._writing: Future[None] | None = None

    def before_change(self) -> None:
        """Call this before the model or the optimizer changes: a save may still be copying them."""
        self._copies.before_change()

    def save(self, folder: Path, optimizer: torch.optim.AdamW | None) -> Callable[[], None]:
        """Copy the model's state, and write it into `folder`, which is made, in the background; all processes take part.

        On a CUDA device, copying goes on in the background too. A save that is still being written is waited for.

        Returns:
            A function that waits for the files of all processes, and raises CheckpointError if some cannot be written.

        Raises:
            CheckpointError: the folder cannot be made.
        """
        state: dict[str, Any] = _weights(self._model)
        if optimizer is not None:
            state[KIND] = type(optimizer).__name__
            state |= _optimizer_states(self._model, optimizer)
        names = tuple(state)
        if names not in self._plans:
            first = dist.get_rank(self._group) == 0
            self._plans[names] = create_default_local_save_plan(state, first)
        if self._writing is not None:
            wait_for([self._writing])  # it writes the copies that are replaced
        tensors = {name: _shard(value) for name, value in state.items() if isinstance(value, Tensor)}
        copies, copied = self._copies.make(tensors)
        planner = _CopiedState(self._plans[names], state | copies)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"cannot write a checkpoint to {folder}: {error}") from error

        def write() -> None:
            copied()
            # Copying ahead would wait for the device between files, though all is in the host's memory.
            writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
            state_dict_saver.save({}, storage_writer=writer, planner=planner, process_group=self._group)

        thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        writing = self._writing = thread.submit(write)
        thread.shutdown(wait=False)

        def wait() -> None:
            try:
                writing.result()
            except (CheckpointException, OSError) as error:
                raise CheckpointError(f"cannot write a checkpoint to {folder}: {_reason(error)}") from error

        return wait


def load(folder: Path, model: nn.Module, optimizer: torch.optim.AdamW | None) -> None:
    """Load a model from `folder`. Without an `optimizer`, optimizer states are ignored.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of another model; that is checked first.
    """
    saved = SavedTensors(folder)
    state = _weights(model)
    _check(folder, state, saved)
    if optimizer is not None and KIND not in saved.names:
        raise CheckpointError(
            f"the checkpoint in {folder} holds no optimizer: it is of a model that was not trained"
        )
    if optimizer is not None:
        forget(optimizer)  # an optimizer that had made no step may have been saved without states
        states = _optimizer_states(model, optimizer)
        state |= {name: value for name, value in states.items() if name in saved.names}
    try:
        state_dict_loader.load(state, checkpoint_id=folder)  # into the tensors themselves
    except CheckpointException as error:
        raise CheckpointError(f"the checkpoint in {folder} is not whole: {_reason(error)}") from error


def saved_weights(folder: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Read the weights in `folder`, one at a time, by the names of `model`, which needs no storage.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is of another model; that is checked first.
    """
    saved, state = SavedTensors(folder), _weights(model)
    _check(folder, state, saved)
    for name in state:
        yield name.removeprefix(MODEL), saved.read(name)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return this process's shards of the parameters that are trained, tied ones once, and the saved buffers.

    `state_dict` reshards parameters that are still whole after a forward pass.
    """
    once = {name for name, _ in chain(trained_parameters(model), model.named_buffers())}
    return {f"{MODEL}{name}": value for name, value in model.state_dict().items() if name in once}


def _shard(value: Tensor) -> Tensor:
    """Return this process's shard of a tensor."""
    return (value.to_local() if isinstance(value, DTensor) else value).detach()


def _check(folder: Path, state: dict[str, Tensor], saved: SavedTensors) -> None:
    """Raise CheckpointError unless names and shapes of the weights in `folder` are those of `state`."""
    shapes = {name: shape for name, shape in saved.shapes.items() if name.startswith(MODEL)}
    for name in sorted(shapes.keys() | state.keys()):
        there, here = shapes.get(name), tuple(state[name].shape) if name in state else None
        if there != here:
            raise CheckpointError(
                f"{folder} holds a checkpoint of another model: {name.removeprefix(MODEL)} "
                f"{_described(there)} there and {_described(here)} here; was model.path changed since?"
            )


def _described(shape: tuple[int, ...] | None) -> str:
    return "is not" if shape is None else f"has shape {shape}"


def _optimizer_states(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return AdamW's states by their names in a checkpoint."""
    return {
        f"{OPTIMIZER}{name}.{key}": value
        for name, parameter in trained_parameters(model)
        for key, value in optimizer.state[parameter].items()
    }


def _reason(error: BaseException) -> str:
    """Return the message of an error, or of the first of those that processes report."""
    if isinstance(error, CheckpointException):
        return str(next(iter(error.failures.values()))[0])
    return str(error)
