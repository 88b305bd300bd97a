"""The order of prompts is a function of seed, epoch and position."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_core.data import DataError, PromptOrder
from iiverl_core.data.order import permutation

sizes = st.integers(1, 200)
seeds = st.integers(-5, 2**64)


@st.composite
def orders(draw: st.DrawFn) -> PromptOrder:
    size = draw(sizes)
    return PromptOrder(size, draw(st.integers(1, size)), draw(seeds), draw(st.booleans()))


@given(orders(), st.integers(0, 3))
def test_an_epoch_uses_no_prompt_twice_and_drops_less_than_a_batch(order: PromptOrder, epoch: int) -> None:
    first = epoch * order.steps_per_epoch
    batches = [order.batch(first + i) for i in range(order.steps_per_epoch)]
    assert {number for number, _ in batches} == {epoch}
    used = np.concatenate([indices for _, indices in batches])
    assert len(set(used.tolist())) == len(used) == order.steps_per_epoch * order.batch_size
    assert used.min() >= 0 and used.max() < order.size
    assert order.size - len(used) < order.batch_size


@given(sizes, seeds, st.integers(0, 2**32))
def test_an_epoch_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(size, seed, epoch).tolist()) == list(range(size))


@given(orders(), st.lists(st.integers(0, 1000), min_size=1, max_size=10))
def test_a_step_does_not_depend_on_the_steps_before_it(order: PromptOrder, steps: list[int]) -> None:
    sequential = {step: order.batch(step)[1].tolist() for step in range(max(steps) + 1) if step in steps}
    permutation.cache_clear()
    for step in steps:
        epoch, indices = PromptOrder(order.size, order.batch_size, order.seed, order.shuffle).batch(step)
        assert epoch == step // order.steps_per_epoch
        assert indices.tolist() == sequential[step]


@given(st.integers(30, 200), seeds, st.integers(0, 1000))
def test_epochs_and_seeds_differ(size: int, seed: int, epoch: int) -> None:
    order = permutation(size, seed, epoch).tolist()
    assert order != permutation(size, seed, epoch + 1).tolist()
    assert order != permutation(size, seed + 1, epoch).tolist()


def philox4x64(counter: int, key: tuple[int, int]) -> list[int]:
    """Ten rounds of Philox over four words, after Salmon et al. 2011; `counter` below 2**64."""
    mask, words, (k0, k1) = 2**64 - 1, [counter, 0, 0, 0], key
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [(b >> 64) ^ words[1] ^ k0, b & mask, (a >> 64) ^ words[3] ^ k1, a & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return words


@given(sizes, st.integers(0, 2**64 - 1), st.integers(0, 2**32))
def test_the_order_is_that_of_the_published_philox(size: int, seed: int, epoch: int) -> None:
    published = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64(0, (0, 0)) == published
    keys = [word for i in range(1, size // 4 + 2) for word in philox4x64(i, (seed, epoch))][:size]
    assert permutation(size, seed, epoch).tolist() == sorted(range(size), key=keys.__getitem__)


def test_without_shuffling_prompts_come_as_they_stand() -> None:
    order = PromptOrder(7, 3, shuffle=False)
    assert [(epoch, indices.tolist()) for epoch, indices in map(order.batch, range(3))] == [
        (0, [0, 1, 2]),
        (0, [3, 4, 5]),
        (1, [0, 1, 2]),
    ]


def test_a_batch_belongs_to_the_caller() -> None:
    order = PromptOrder(8, 4)
    before = order.batch(0)[1].tolist()
    order.batch(0)[1][:] = -1
    assert order.batch(0)[1].tolist() == before


def test_fewer_prompts_than_a_batch_is_an_error() -> None:
    with pytest.raises(DataError, match=r"3 prompts.*data.train_batch_size: 8(.|\n)*to 3 or less"):
        PromptOrder(3, 8)
