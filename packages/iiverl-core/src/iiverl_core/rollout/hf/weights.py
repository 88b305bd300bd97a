"""Copying weights into a model by name."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

SHOWN = 5  # names of one kind that an error lists


@torch.no_grad()
def copy_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Copy each weight into the model's parameter or saved buffer of that name, converting dtype and device.

    Tied weights may be given once, under any of their names, or more than once with the same values. Each tensor is
    used before the next is asked for. `weights` is read to its end in any case, because several processes may be
    gathering them together.

    Raises:
        ValueError: names are unknown, left out or given twice, shapes do not fit, or tied weights differ. The model
            then holds an unusable mixture.
    """
    slots = model.state_dict(keep_vars=True)
    given: dict[int, str] = {}
    unknown: list[str] = []
    wrong: list[str] = []
    for name, value in weights:
        slot = slots.get(name)
        if slot is None:
            unknown.append(name)
        elif slot.shape != value.shape:
            wrong.append(f"{name} is {tuple(value.shape)} and should be {tuple(slot.shape)}")
            given[id(slot)] = name
        elif id(slot) not in given:
            slot.copy_(value)
            given[id(slot)] = name
        elif given[id(slot)] == name:
            wrong.append(f"{name} was given twice")
        elif not torch.equal(slot, value.to(slot)):
            wrong.append(f"{name} differs from {given[id(slot)]}, with which it is tied")
    first_names = {id(slot): name for name, slot in reversed(slots.items())}
    missing = [name for key, name in reversed(first_names.items()) if key not in given]
    problems = [
        *([f"unknown: {_listed(unknown)}"] if unknown else []),
        *([f"missing: {_listed(missing)}"] if missing else []),
        *([_listed(wrong, "; ")] if wrong else []),
    ]
    if problems:
        raise ValueError(f"the weights do not fit {type(model).__name__}. " + "; ".join(problems))


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more
