"""Checks of the weights that an engine gets: names, shapes, and a checksum of their bits."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from iiverl_core.errors import WeightMismatchError, join_names
from iiverl_core.rollout.hf_names import checkpoint_slots, place_of

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 2**20  # elements whose products are held at a time
STEP = 0x9E3779B97F4A7C15 - 2**64  # odd: the golden ratio's bits, as a signed word
MIX = 0xBF58476D1CE4E5B9 - 2**64


class ExpectedWeights:
    """Names and shapes of a checkpoint's weights, against which the weights of an update are checked as they stream past.

    Tied weights may be given once, under any of their names, or more than once with the same values; they are passed on
    under the first of their names.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Read them from the model as transformers has it; it may be on the meta device. Raises as `checkpoint_slots`."""
        slots = checkpoint_slots(model)
        first: dict[tuple, str] = {}
        self._model_name = type(model).__name__
        self._canonical = {name: first.setdefault(place_of(slot), name) for name, slot in slots.items()}
        self.slots = {name: slots[name] for name in first.values()}
        """Where each weight lies in the model, by the first of its names."""
        self.shapes = {name: slot.shape for name, slot in self.slots.items()}

    def check(
        self, weights: Iterable[tuple[str, Tensor]], optional: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight under its first name until one does not fit, and read the rest without yielding.

        The `optional` ones may be left out, all of them together. The rest is read because several processes may be
        gathering the weights together.

        Raises:
            ValueError: once all are read: names are unknown, left out or given twice, shapes do not fit, or tied
                weights differ.
        """
        given: dict[str, str] = {}
        digests: dict[str, int] = {}
        tied = {self._canonical[name] for name in self._canonical if self._canonical[name] != name}
        unknown: list[str] = []
        wrong: list[str] = []
        for name, value in weights:
            first = self._canonical.get(name)
            if first is None:
                unknown.append(name)
                continue
            if self.shapes[first] != value.shape:
                wrong.append(f"{name} is {tuple(value.shape)} and should be {tuple(self.shapes[first])}")
                given.setdefault(first, name)
                continue
            if first in tied:
                bits = digest(value)
                if digests.setdefault(first, bits) != bits:
                    wrong.append(f"{name} differs from {given[first]}, with which it is tied")
            if given.get(first) == name:
                wrong.append(f"{name} was given twice")
            elif first not in given:
                given[first] = name
                if not unknown and not wrong:
                    yield first, value
        omitted = optional if not any(name in given for name in optional) else ()
        missing = [name for name in self.shapes if name not in given and name not in omitted]
        self._raise(unknown, missing, wrong)

    def _raise(self, unknown: Sequence[str], missing: Sequence[str], wrong: Sequence[str]) -> None:
        problems = [
            *([f"unknown: {join_names(unknown)}"] if unknown else []),
            *([f"missing: {join_names(missing)}"] if missing else []),
            *([join_names(wrong, "; ")] if wrong else []),
        ]
        if problems:
            raise ValueError(f"the weights do not fit {self._model_name}. " + "; ".join(problems))


def compare(engine: str, given: Mapping[str, int], held: Mapping[str, Sequence[int]]) -> None:
    """Compare the digests of the weights that an engine was given with those of every copy that it computes with.

    Raises:
        WeightMismatchError: they differ.
    """
    raise_mismatch(engine, [name for name, value in given.items() if set(held[name]) != {value}], len(given))


def raise_mismatch(engine: str, wrong: Sequence[str], count: int) -> None:
    """Raise WeightMismatchError if some of `count` weights, those named, are wrong in an engine."""
    if wrong:
        raise WeightMismatchError(
            f"{len(wrong)} of {count} weights did not arrive in {engine} as they were given: {join_names(wrong)}. "
            "Nothing can be generated with what it holds now"
        )


def digest(tensor: Tensor) -> int:
    """Return a 64-bit checksum of a tensor's values in their order, computed on its device and the same on all.

    It is the sum, modulo 2^64, of each element's bits times an odd number that depends on its position (multilinear hashing,
    with the mixing step of Steele et al., "Fast splittable pseudorandom number generators", 2014). A single element that
    differs always changes it; several do except in one case of 2^64. Both zeros count as equal, since a kernel need not
    keep the sign of a zero.
    """
    values = tensor.detach().reshape(-1)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(values), CHUNK):
        part = values[start : start + CHUNK] + 0  # minus zero becomes zero
        bits = part.view(BITS[part.element_size()]).long()
        places = torch.arange(start, start + len(part), device=values.device) * STEP
        total += (bits * (((places ^ (places >> 29)) * MIX) | 1)).sum()
    return int(total)
