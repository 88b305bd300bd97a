"""Build micro-batches from token sequences."""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch

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
    tokens_by_staleness: Mapping[int, int] | None = None,
    device: torch.device,
) -> MicroBatch:
    """Combine B sequences, their `arrays` by name, (trained,) each, and the loss weight per token of each sequence.

    `groups` has the group of each sequence, whose common prefix may be computed once; `tokens_by_staleness` is passed on.

    The sequences of a reward model may have no trained tokens; its micro-batches have neither arrays nor weights.

    Raises:
        ValueError: there are weights, and a sequence has no trained tokens.
    """
    trained = [sequence.trained for sequence in sequences]
    if weights and not all(trained):
        raise ValueError(f"a sequence without trained tokens is to be left out; they have {trained}")
    weights_T = np.repeat(np.array(weights, np.float64), trained if weights else 0)
    return MicroBatch(
        sequences=list(sequences),
        weights_T=to_device(weights_T, device),
        inv_num_tokens=inv_num_tokens,
        temperature=temperature,
        groups=groups,
        tokens_by_staleness=tokens_by_staleness or {},
        arrays_T={name: to_device(np.concatenate(parts), device) for name, parts in arrays.items()},
    )


def dummy_micro_batch(names: Sequence[str], device: torch.device) -> MicroBatch:
    """Create the smallest micro-batch that adds nothing to a loss, with zeros for the arrays `names`."""
    zero = np.zeros(1, dtype=np.float32)
    sequence = TokenSequence.single_turn([0], np.zeros(1, dtype=np.int64), zero)
    return make_micro_batch([sequence], {name: [zero] for name in names}, [0.0], device=device)
