"""The random numbers of a sequence are its own."""

import numpy as np
import torch

from iiverl_core.rollout.uniforms import CHUNK, Uniforms

CPU = torch.device("cpu")


def column(uniforms: Uniforms, row: int, count: int) -> list[float]:
    return [uniforms.next()[row].item() for _ in range(count)]


def test_a_stream_is_philox_with_seed_and_number_for_key() -> None:
    expected = np.random.Generator(np.random.Philox(key=[12, 3])).random(2 * CHUNK + 1)
    assert column(Uniforms([12], [3], CPU), 0, 2 * CHUNK + 1) == expected.tolist()


def test_a_stream_does_not_depend_on_its_company() -> None:
    alone = column(Uniforms([5], [1], CPU), 0, 100)
    assert column(Uniforms([7, 5, 5], [1, 1, 0], CPU), 1, 100) == alone
    streams = Uniforms([7, 5, 5], [1, 1, 0], CPU)
    before = column(streams, 1, 40)
    streams.keep(np.array([2, 1]))
    assert before + column(streams, 1, 60) == alone


def test_streams_differ_by_seed_and_by_number_and_are_even() -> None:
    pairs = [(seed, member) for seed in (0, 1, -1, 2**63, 10**30) for member in range(200)]
    uniforms = Uniforms([seed for seed, _ in pairs], [member for _, member in pairs], CPU)
    values = torch.stack([uniforms.next() for _ in range(20)])
    assert values.flatten().unique().numel() == values.numel()
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
    assert np.abs(np.corrcoef(values[:, ::200].numpy().T) - np.eye(5)).max() < 0.9
