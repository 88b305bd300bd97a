"""Build micro-batches from token sequences."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch

from iiverl_core.algorithms import Segments
from iiverl_core.samples import TokenSequence
from iiverl_core.training.backend import MicroBatch
from iiverl_core.training.host_memory import to_device


def make_micro_batch(
    sequences: Sequence[TokenSequence],
    arrays: Mapping[str, Sequence[np.ndarray]],
    weights: Sequence[float],
    *,
    inv_num_tokens: float = 0.0,
    temperature: float = 1.0,
    groups: Sequence[Hashable] = (),
    device: torch.device,
) -> MicroBatch:
    """Combine B sequences, their `arrays` by name, (trained,) each, and the loss weight per token of each sequence.

    `groups` has the group of each sequence, whose common prefix may be computed once.

    The sequences of a reward model may have no trained tokens; its micro-batches have neither arrays nor weights.

    Raises:
        ValueError: there are weights, and a sequence has no trained tokens.
    """
    weights_T = torch.zeros(0, dtype=torch.float64, device=device)
    if weights:
        segments = Segments.of([sequence.trained for sequence in sequences], device)
        weights_T = segments.expand(torch.tensor(weights, dtype=torch.float64, device=device))
    return MicroBatch(
        sequences=list(sequences),
        weights_T=weights_T,
        inv_num_tokens=inv_num_tokens,
        temperature=temperature,
        groups=groups,
        arrays_T={name: to_device(np.concatenate(parts), device) for name, parts in arrays.items()},
    )


def dummy_micro_batch(names: Sequence[str], device: torch.device) -> MicroBatch:
    """Create the smallest micro-batch that adds nothing to a loss, with zeros for the arrays `names`."""
    zero = np.zeros(1, dtype=np.float32)
    sequence = TokenSequence.single_turn([0], np.zeros(1, dtype=np.int64), zero)
    return make_micro_batch([sequence], {name: [zero] for name in names}, [0.0], device=device)
