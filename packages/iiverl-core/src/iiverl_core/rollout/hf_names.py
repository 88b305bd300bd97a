"""A model's weights under the names, and in the shapes, of its checkpoints on disk.

transformers computes with some of them joined: the experts of a layer are one tensor, and a checkpoint has one for each
expert and projection. What goes from training to engines is named as in a checkpoint.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


class _Whole(Tensor):
    """A tensor of which transformers, when it takes it apart as for saving, makes views and no copies."""

    def contiguous(self, *_: Any, **__: Any) -> "_Whole":
        return self


def checkpoint_slots(model: PreTrainedModel) -> dict[str, Tensor]:
    """Give the places of a checkpoint's weights in the memory of `model`, which may be on the meta device.

    Tied weights have the same place under each of their names; `place_of` tells.

    Raises:
        ValueError: a weight is no part of the model's memory: it would have to be computed.
    """
    slots: dict[str, Tensor] = {}
    for name, slot in model.state_dict().items():
        parts = revert_weight_conversion(model, {name: slot.as_subclass(_Whole)})
        for part_name, part in parts.items():
            slots[part_name] = part.as_subclass(Tensor)
            if place_of(part)[0] != place_of(slot)[0]:
                raise ValueError(
                    f"{part_name}, as checkpoints have it, is no part of {type(model).__name__}'s {name}"
                )
    return slots


def place_of(slot: Tensor) -> tuple[Any, ...]:
    """Say where a tensor lies: equal for two that are the same memory, also where that is none (`meta`)."""
    return slot.untyped_storage()._cdata, slot.storage_offset(), *slot.shape
