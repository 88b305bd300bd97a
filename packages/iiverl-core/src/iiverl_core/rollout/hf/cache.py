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
MIN_ROOM = 32  # tokens for which a layer has room after it was moved, at least


def cache_argument(model: PreTrainedModel) -> str:
    """Return the name under which `model.forward` takes its key-value cache.

    Raises:
        ConfigError: it takes none.
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
    """Which rows of a batch go on, and from which column.

    `order` names them by their old positions: rows before `len(order)` stay where they are, and the others fill the
    `holes` that ended rows leave, from `movers`. So no row is moved without need.
    """

    order: np.ndarray
    holes: np.ndarray
    movers: np.ndarray
    first_column: int = 0

    @classmethod
    def of(cls, goes_on: np.ndarray, first_column: int = 0) -> "Selection":
        """Keep the rows where `goes_on` (B,) is true."""
        count = int(goes_on.sum())
        holes = np.flatnonzero(~goes_on[:count])
        movers = count + np.flatnonzero(goes_on[count:])
        order = np.arange(count)
        order[holes] = movers
        return cls(order, holes, movers, first_column)


class GrowingLayer(DynamicLayer):
    """A layer of full attention, with room for more tokens behind those it holds.

    Where transformers' own layer copies all keys and values for each new token, this one copies them when the room is
    used up, which is by a quarter of their number.
    """

    def __init__(self) -> None:
        super().__init__()
        self._rooms: tuple[Tensor, ...] = ()  # for keys, for values: (B, G, L + room, D)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, G, L, D) and return all of them."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._rooms:
            self._rooms, self.is_initialized = (key_states, value_states), True
        else:
            if self._rooms[0].shape[-2] < end:
                self._move(more=key_states.shape[-2])
            for room, states in zip(self._rooms, (key_states, value_states), strict=True):
                room[:, :, start:end] = states
        return self._show(end)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._move(repeats=repeats)

    def keep(self, selection: Selection) -> None:
        """Go on with the selected rows and columns."""
        end = self.get_seq_length()
        if selection.holes.size:
            holes, movers = torch.from_numpy(selection.holes), torch.from_numpy(selection.movers)
            for room in self._rooms:
                room[holes, :, :end] = room[movers, :, :end]
        count, first = len(selection.order), selection.first_column
        self._rooms = tuple(room[:count, :, first:] for room in self._rooms)
        self._show(end - first)

    def join(self, other: "GrowingLayer", length: int) -> None:
        """Add the rows of `other` behind these; both are padded on the left with zeros to `length` columns."""
        more = max(MIN_ROOM, length // 4)
        self._rooms = tuple(
            _joined(
                self_room[:, :, : self.get_seq_length()], room[:, :, : other.get_seq_length()], length, more
            )
            for self_room, room in zip(self._rooms, other._rooms, strict=True)
        )
        self._show(length)

    def _move(self, repeats: int = 1, more: int = 0) -> None:
        end = self.get_seq_length()
        more = max(more, MIN_ROOM, end // 4)
        self._rooms = tuple(_larger_room(room[:, :, :end], repeats, more) for room in self._rooms)
        self._show(end)

    def _show(self, end: int) -> tuple[Tensor, Tensor]:
        keys, values = (room[:, :, :end] for room in self._rooms)
        self.keys, self.values = keys, values
        return keys, values


def _larger_room(states: Tensor, repeats: int, more: int) -> Tensor:
    """Copy (B, G, L, D) states, each row `repeats` times, to the front of a room for L + `more` tokens."""
    n_rows, n_groups, length, width = states.shape
    room = states.new_empty(n_rows, repeats, n_groups, length + more, width)
    room[:, :, :, :length] = states[:, None]
    return room.flatten(0, 1)


def _joined(first: Tensor, second: Tensor, length: int, more: int = 0) -> Tensor:
    """Copy (B, G, L, D) states into one room for `length` + `more` tokens, each padded on the left to `length`."""
    _, n_groups, _, width = first.shape
    room = first.new_zeros(len(first) + len(second), n_groups, length + more, width)
    room[: len(first), :, length - first.shape[-2] : length] = first
    room[len(first) :, :, length - second.shape[-2] : length] = second
    return room


def _states(layer: DynamicLayer) -> tuple[Tensor, Tensor]:
    if layer.keys is None or layer.values is None:
        raise RuntimeError("a layer of the cache is empty: the prompts have not been run")
    return layer.keys, layer.values


class RowCache(DynamicCache):
    """A cache for `model` of which rows can be repeated and selected.

    Raises:
        ConfigError: the model's layers keep something else than keys and values, as those of state-space models do.
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
                "keys and values. Take a model whose layers are all attention."
            )
        self.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in self.layers]

    @property
    def keeps_all(self) -> bool:
        """Whether every layer holds every column, none a window of the last ones."""
        return all(isinstance(layer, GrowingLayer) for layer in self.layers)

    def keep(self, selection: Selection) -> None:
        """Go on with the selected rows; `selection.first_column` above 0 needs `keeps_all`."""
        for layer in self.layers:
            if isinstance(layer, GrowingLayer):
                layer.keep(selection)
            elif isinstance(layer, DynamicLayer):
                layer.batch_select_indices(torch.from_numpy(selection.order))

    def join(self, other: "RowCache", length: int) -> None:
        """Add the rows of `other` behind these; the shorter is padded on the left to `length` columns.

        A layer with a window holds the last columns alone, so it is padded to what the longer one holds.
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
