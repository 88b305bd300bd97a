"""Processes that tests of the Megatron backend share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ranks import Ranks


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes in a group of their own; each call lays them out anew."""
    with Ranks(4, tmp_path_factory.mktemp("four-ranks")) as ranks:
        yield ranks
