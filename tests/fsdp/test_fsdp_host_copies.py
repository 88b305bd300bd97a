"""Where copies of tensors lie in the host's memory; CUDA's streams are checked by `benchmarks/gpu_check.py`."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from iiverl_fsdp.host_copies import ALIGNMENT, HostCopies, place

BLOCK = 1024


@given(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=40))
def test_arrays_have_places_of_their_own_and_blocks_are_not_larger_than_needed(
    given_sizes: list[int],
) -> None:
    sizes = {str(i): size for i, size in enumerate(given_sizes)}
    blocks, places = place(sizes, BLOCK)
    taken = [[False] * size for size in blocks]
    for name, (block, start) in places.items():
        assert start % ALIGNMENT == 0
        assert not any(taken[block][start : start + sizes[name]])
        taken[block][start : start + sizes[name]] = [True] * sizes[name]
        assert start + sizes[name] <= blocks[block]
    for i, size in enumerate(blocks):
        alone = [name for name, (block, _) in places.items() if block == i and sizes[name]]
        assert size <= BLOCK or len(alone) == 1
    assert sum(sorted(blocks)[:2]) > BLOCK or len(blocks) == 1  # two that fit into one block are one


def test_copies_of_tensors_on_the_cpu_do_not_change_with_them() -> None:
    copies = HostCopies()
    tensors = {"a": torch.arange(3.0), "b": torch.tensor(1.0), "c": torch.zeros(0, 2)}
    made, wait = copies.make(tensors)
    copies.before_change()
    tensors["a"].zero_()
    wait()
    assert made["a"].tolist() == [0, 1, 2]
    assert made["b"].shape == () and made["c"].shape == (0, 2)
