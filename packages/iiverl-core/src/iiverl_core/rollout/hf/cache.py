"""The key-value cache of a batch whose sequences end one by one."""

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from iiverl_core.errors import ConfigError

CACHE_ARGUMENTS = ("cache", "past_key_values")  # of a model's `forward`, since transformers 5.24 and before
MIN_SPARE = 32  # tokens that a layer can append after a reallocation, at least


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name of the argument of `model.forward` for its key-value cache.

    Raises:
        ConfigError: there is none.
    """
    accepted = inspect.signature(model.forward).parameters
    for name in CACHE_ARGUMENTS:
        if name in accepted:
            return name
    raise ConfigError(
        f"the rollout engine `hf` cannot run {type(model).__name__} of transformers {transformers.__version__}: its "
        f"forward takes no key-value cache (none of {', '.join(CACHE_ARGUMENTS)} is an argument). "
        "Use a causal language model with attention; if this one worked before, use the earlier transformers version"
    )


@dataclass(frozen=True)
class Selection:
    """The rows of a batch to keep, and the first column to keep.

    `order` holds their old positions: rows before `len(order)` stay, and the others, `movers`, fill the `holes` that
    ended rows leave. So as few rows as possible are copied.
    """

    order: np.ndarray
    holes: np.ndarray
    movers: np.ndarray
    first_column: int = 0

    @classmethod
    def of(cls, kept_B: np.ndarray, first_column: int = 0) -> "Selection":
        """Keep the rows for which `kept_B` (B,) is true."""
        count = int(kept_B.sum())
        holes = np.flatnonzero(~kept_B[:count])
        movers = count + np.flatnonzero(kept_B[count:])
        order = np.arange(count)
        order[holes] = movers
        return cls(order, holes, movers, first_column)


class GrowingLayer(DynamicLayer):
    """A layer of full attention with spare capacity for more tokens.

    transformers' own layer copies all keys and values for each new token; this one only when the capacity is used up,
    and then grows by a quarter.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: tuple[Tensor, ...] = ()  # keys, values: (B, G, L + spare, D)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, G, L, D) and return all of them."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._buffers:
            self._buffers, self.is_initialized = (key_states, value_states), True
        else:
            if self._buffers[0].shape[-2] < end:
                self._reallocate(spare=key_states.shape[-2])
            for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
                buffer[:, :, start:end] = states
        return self._show(end)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._reallocate(repeats=repeats)

    def continue_apart(self, repeats: int) -> tuple[Tensor, Tensor]:
        """Go on with `repeats` empty rows for each row, and return the keys and values of the tokens so far."""
        states = self._show(self.get_seq_length())
        self._buffers = tuple(_repeated(buffer[:, :, :0], repeats, MIN_SPARE) for buffer in states)
        self._show(0)
        return states

    def keep(self, selection: Selection) -> None:
        """Keep the selected rows and columns."""
        end = self.get_seq_length()
        if selection.holes.size:
            holes, movers = torch.from_numpy(selection.holes), torch.from_numpy(selection.movers)
            for buffer in self._buffers:
                buffer[holes, :, :end] = buffer[movers, :, :end]
        count, first = len(selection.order), selection.first_column
        self._buffers = tuple(buffer[:count, :, first:] for buffer in self._buffers)
        self._show(end - first)

    def join(self, other: "GrowingLayer", length: int) -> None:
        """Append the rows of `other`; both are padded on the left with zeros to `length` columns."""
        spare = max(MIN_SPARE, length // 4)
        self._buffers = tuple(
            _joined(
                mine[:, :, : self.get_seq_length()], buffer[:, :, : other.get_seq_length()], length, spare
            )
            for mine, buffer in zip(self._buffers, other._buffers, strict=True)
        )
        self._show(length)

    def _reallocate(self, repeats: int = 1, spare: int = 0) -> None:
        end = self.get_seq_length()
        spare = max(spare, MIN_SPARE, end // 4)
        self._buffers = tuple(_repeated(buffer[:, :, :end], repeats, spare) for buffer in self._buffers)
        self._show(end)

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, :end] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def _repeated(states: Tensor, repeats: int, spare: int) -> Tensor:
    """Copy (B, G, L, D) states, each row `repeats` times, into a buffer for L + `spare` tokens."""
    n_rows, n_groups, length, width = states.shape
    buffer = states.new_empty(n_rows, repeats, n_groups, length + spare, width)
    buffer[:, :, :, :length] = states[:, None]
    return buffer.flatten(0, 1)


def _joined(first: Tensor, second: Tensor, length: int, spare: int = 0) -> Tensor:
    """Copy (B, G, L, D) states into one buffer for `length` + `spare` tokens, each padded on the left to `length`."""
    _, n_groups, _, width = first.shape
    buffer = first.new_zeros(len(first) + len(second), n_groups, length + spare, width)
    buffer[: len(first), :, length - first.shape[-2] : length] = first
    buffer[len(first) :, :, length - second.shape[-2] : length] = second
    return buffer


def _states(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    if layer.keys is None or layer.values is None:
        raise RuntimeError("a layer of the cache is empty: the prompts have not been run")
    return layer.keys, layer.values


class RowCache(DynamicCache):
    """A cache for `model` whose rows can be repeated, selected and joined.

    Raises:
        ConfigError: the model's layers keep a state other than keys and values, as state-space models do.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(config=model.config)
        others = {type(layer).__name__ for layer in self.layers} - {
            DynamicLayer.__name__,
            DynamicSlidingWindowLayer.__name__,
        }
        if others or getattr(model, "_is_stateful", False):
            raise ConfigError(
                f"the rollout engine `hf` cannot run {type(model).__name__}: its layers keep a state that is not "
                "keys and values. Use a model whose layers are all attention."
            )
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]

    @property
    def keeps_all(self) -> bool:
        """Whether every layer holds all columns, rather than a window of the last ones."""
        return all(isinstance(layer, GrowingLayer) for layer in self.layers)

    def continue_apart(self, repeats: int) -> list[tuple[Tensor, Tensor]]:
        """Go on with `repeats` empty rows for each row, and return each layer's keys and values so far.

        This needs `keeps_all`.
        """
        return [layer.continue_apart(repeats) for layer in self.layers if isinstance(layer, GrowingLayer)]

    def keep(self, selection: Selection) -> None:
        """Keep the selected rows; `selection.first_column` above 0 needs `keeps_all`."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.keep(selection)
            elif isinstance(layer, DynamicLayer):
                layer.batch_select_indices(torch.from_numpy(selection.order))

    def join(self, other: "RowCache", length: int) -> None:
        """Append the rows of `other`; the shorter is padded on the left to `length` columns.

        A layer with a window holds the last columns only, so it is padded to those of the longer one.
        """
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            if isinstance(mine, GrowingLayer) and isinstance(theirs, GrowingLayer):
                mine.join(theirs, length)
            elif isinstance(mine, DynamicSlidingWindowLayer) and isinstance(
                theirs, DynamicSlidingWindowLayer
            ):
                pairs = list(zip(_states(mine), _states(theirs), strict=True))
                held = max(states.shape[-2] for states in pairs[0])
                mine.keys, mine.values = (_joined(first, second, held) for first, second in pairs)
                mine.cumulative_length = length
