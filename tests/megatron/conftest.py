"""Processes that tests of the Megatron backend share."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from ranks import Ranks


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory):
    """This process as a group of one."""
    torch.set_num_threads(1)
    meeting = (tmp_path_factory.mktemp("group") / "meeting").as_uri()
    dist.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes in a group of their own; each call lays them out anew."""
    with Ranks(4, tmp_path_factory.mktemp("four-ranks")) as ranks:
        yield ranks
