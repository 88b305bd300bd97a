"""Copies of tensors in the host's memory, made while the device goes on computing.

Tensors on a CUDA device are copied on a stream of their own into page-locked memory, so neither the host nor the stream that
computes waits. The memory is kept for the next copies: locking it takes longer than copying.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and a multiple of the size of every element
BLOCK = 2**30  # bytes; torch rounds the size of page-locked memory up to a power of two


class HostCopies:
    """Copies one set of tensors after another; the memory of the last copies is used for the next."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.cuda.Event | None = None

    def make(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Start to copy tensors. Call `before_change` before something changes them.

        Returns:
            The copies, which are valid until the next call, and a function that waits until they are made.
        """
        copies = {name: tensor.clone() for name, tensor in tensors.items() if not tensor.is_cuda}
        there = {name: tensor for name, tensor in tensors.items() if tensor.is_cuda}
        if not there:
            return copies, lambda: None
        sizes, places = place({name: tensor.nbytes for name, tensor in there.items()})
        if sizes != [len(block) for block in self._blocks]:
            self._blocks = []  # before as much is allocated again
            self._blocks = [_locked(size) for size in sizes]
        stream = self._stream = self._stream or torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for name, tensor in there.items():
                block, start = places[name]
                memory = self._blocks[block][start : start + tensor.nbytes]
                copies[name] = memory.view(tensor.dtype).view(tensor.shape)
                copies[name].copy_(tensor, non_blocking=True)
            copied = self._copied = torch.cuda.Event()
            copied.record()
        return copies, copied.synchronize

    def before_change(self) -> None:
        """Let what the current stream computes from here on begin after the last copies are made."""
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)
            self._copied = None


def place(sizes: Mapping[str, int], block: int = BLOCK) -> tuple[list[int], dict[str, tuple[int, int]]]:
    """Distribute arrays over blocks, the largest first, each to the first block with room.

    Args:
        sizes: in bytes.
        block: bytes of a block; a larger array has one of its own.

    Returns:
        The bytes of the blocks, and the block and the first byte of each array.
    """
    blocks: list[int] = []
    places: dict[str, tuple[int, int]] = {}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        aligned = -(-size // ALIGNMENT) * ALIGNMENT
        chosen = next((i for i, used in enumerate(blocks) if used + aligned <= block), len(blocks))
        if chosen == len(blocks):
            blocks.append(0)
        places[name] = chosen, blocks[chosen]
        blocks[chosen] += aligned
    return blocks, places


def _locked(size: int) -> Tensor:
    """Allocate page-locked memory, or other memory where that is not possible: copies then take longer."""
    with suppress(RuntimeError):
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    return torch.empty(size, dtype=torch.uint8)
