"""A model's weights by the names and shapes of its checkpoints on disk.

transformers joins some of them to compute: the experts of a layer are one tensor, while a checkpoint has one per expert
and projection. Weights go from trainer to engine by the names of checkpoints.
"""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


class _Whole(Tensor):
    """A tensor that transformers splits into views, not copies, as if to save it."""

    def contiguous(self, *_: Any, **__: Any) -> "_Whole":
        return self


def checkpoint_slots(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a view of the memory of `model` for each weight of its checkpoint; it may be on the meta device.

    `place_of` is equal for the names of tied weights.

    Raises:
        ValueError: a weight is not a view of the model's memory: it would have to be computed.
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
    """Return a key of a tensor's memory, equal for two tensors that share it; works on the meta device."""
    return slot.untyped_storage()._cdata, slot.storage_offset(), *slot.shape
