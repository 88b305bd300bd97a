"""The order of prompts as a function of seed, epoch and position."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from iiverl_core.errors import DataError


@dataclass(frozen=True)
class PromptOrder:
    """The prompts of each step.

    An epoch is a permutation of `size` prompts, cut into batches; a partial last batch is dropped. The batch of a step
    depends only on the first four fields and the step, so a resumed run needs no state beyond its step. `key` is the key
    of the configuration that sets `batch_size`.

    Raises:
        DataError: the dataset is smaller than one batch.
    """

    size: int
    batch_size: int
    seed: int = 1
    shuffle: bool = True
    key: str = "data.train_batch_size"

    def __post_init__(self) -> None:
        if self.size < self.batch_size:
            raise too_few_prompts(self.size, self.key, self.batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Number of full batches in an epoch."""
        return self.size // self.batch_size

    def batch(self, step: int) -> tuple[int, np.ndarray]:
        """Return the epoch of a step and the prompts of its batch, (batch_size,) int64; both count from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        if not self.shuffle:
            return epoch, np.arange(start, start + self.batch_size)
        return epoch, permutation(self.size, self.seed, epoch)[start : start + self.batch_size].copy()


def too_few_prompts(size: int, key: str, batch_size: int) -> DataError:
    """Return an error about training data of `size` prompts, fewer than the `batch_size` that `key` asks for."""
    return DataError(
        f"The training data has {size} prompts, fewer than one step takes ({key}: {batch_size}).\n"
        f"Set {key} to {size} or less, or add data."
    )


@lru_cache(maxsize=2)
def permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    """Return a random permutation, (size,) int64, read-only; the same on every platform and version.

    It sorts random keys, the raw output of Philox4x64-10 with the key (seed, epoch): a published function (Salmon et
    al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011) whose stream numpy guarantees, unlike that of
    `Generator.permutation`.
    """
    philox = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64))
    order = np.argsort(philox.random_raw(size), kind="stable")
    order.setflags(write=False)
    return order
