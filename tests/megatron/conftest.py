"""Processes that tests of the Megatron backend share."""

from collections.abc import Callable

import pytest

from ranks import Ranks


@pytest.fixture
def four_ranks(ranks: Callable[..., Ranks]) -> Ranks:
    """Four processes in a group of their own; each call lays them out again."""
    return ranks(4, "iiverl_megatron.backend")
