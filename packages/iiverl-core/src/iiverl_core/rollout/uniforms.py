"""The random numbers of sampling: one stream per sequence, a function of its seed and member."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CHUNK = 64  # numbers drawn from a stream at a time
WORD = 2**64


class Uniforms:
    """Numbers in [0, 1) on `device` for B sequences, one per sequence at a time.

    Each sequence has a Philox4x64-10 counter-based generator (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2,
    3", 2011) whose key is its seed, modulo 2^64, and its member. A number is the upper 53 bits of a word, the same on every
    platform and with every version of numpy.
    """

    def __init__(self, seeds: Sequence[int], members: Sequence[int], device: torch.device) -> None:
        self._streams = _streams(seeds, members, [0] * len(seeds))
        self._device = device
        self._chunk = torch.empty(CHUNK, len(self._streams), dtype=torch.float64, device=device)
        self._used = CHUNK

    def next(self) -> Tensor:
        """Return the next number of each sequence, (B,) float64."""
        if self._used == CHUNK:
            self._chunk = self._draw(self._streams, CHUNK)
            self._used = 0
        self._used += 1
        return self._chunk[self._used - 1]

    def join(self, seeds: Sequence[int], members: Sequence[int], used: Sequence[int]) -> None:
        """Append sequences, each after the first `used` numbers of its stream."""
        streams = _streams(seeds, members, used)
        chunk = self._chunk.new_empty(CHUNK, len(streams))
        chunk[self._used :] = self._draw(streams, CHUNK - self._used)
        self._chunk = torch.cat([self._chunk, chunk], dim=1)
        self._streams += streams

    def keep(self, order: np.ndarray) -> None:
        """Keep the sequences at these positions, in this order."""
        self._streams = [self._streams[i] for i in order.tolist()]
        self._chunk = self._chunk[:, torch.from_numpy(order)]

    def _draw(self, streams: Sequence[np.random.Philox], count: int) -> Tensor:
        words = np.stack([stream.random_raw(count) for stream in streams], axis=1)
        return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53).to(self._device)


def _streams(seeds: Sequence[int], members: Sequence[int], used: Sequence[int]) -> list[np.random.Philox]:
    streams = [
        np.random.Philox(key=np.array([seed % WORD, member], dtype=np.uint64))
        for seed, member in zip(seeds, members, strict=True)
    ]
    for stream, count in zip(streams, used, strict=True):
        stream.random_raw(count)
    return streams
