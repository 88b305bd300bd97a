"""The seam between the loop and what generates."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from iiverl_core.samples import FinishReason


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. `temperature` 0 is greedy; `top_k` -1 and `top_p` 1 are off; `max_tokens` bounds the response."""

    n: int = 1
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    max_tokens: int = 512
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to answer `SamplingParams.n` times.

    `key` is the caller's name for it. `seed` and the number of the response decide its random numbers, so a response
    does not depend on what else is in the batch. `members` are the numbers of the responses that are wanted, where it
    is not all of 0 … n-1: those that an engine owes that ended before it had written them.
    """

    key: int
    prompt_ids: Sequence[int]
    seed: int = 0
    members: Sequence[int] | None = None

    def numbers(self, n: int) -> Sequence[int]:
        """Give the numbers of the responses to write, where `SamplingParams.n` is `n`."""
        return range(n) if self.members is None else self.members


@dataclass(frozen=True, slots=True)
class Completion:
    """One response.

    `token_ids` (R,) int64 with the end-of-sentence token where one was sampled; `log_probs` (R,) float32 of each token
    under the distribution it was sampled from: after temperature, top-k and top-p, and so 0 where greedy.
    """

    key: int
    member: int
    token_ids: np.ndarray
    log_probs: np.ndarray
    finish_reason: FinishReason
    weights_version: int


class RolloutEngine(Protocol):
    """Generates with weights of its own."""

    weights_version: int
    """Version of the weights in use; -1 before the first update."""

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        """Yield each response as it finishes, in any order.

        Raises:
            RuntimeError: no weights were given yet.
        """
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace every weight by name.

        Raises:
            ValueError: a name or a shape does not fit, or a weight of the engine was left out.
        """
        ...

    def sleep(self, *, weights: bool = False) -> None:
        """Give back the memory that only generating needs; what comes next wakes the engine by itself.

        With `weights`, those are forgotten as well, and an update has to come before anything is generated.
        """
        ...

    def close(self) -> None:
        """End the engine, which is of no use afterwards, also in the middle of a stream. May be called twice.

        It may take down torch.distributed in this process, where it has groups of its own.
        """
        ...
