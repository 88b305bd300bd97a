"""Servers for the tests: one that all share, and one of a test's own."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from iiverl_reward_client.server import Settings
from reward_server.judges import Judge, judging
from reward_server.served import Server, running

Start = Callable[..., Server]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start servers with settings given by name, which end with the test."""
    with ExitStack() as stack:

        def run(*files: str, **settings: Any) -> Server:
            return stack.enter_context(running(Settings(**{"workers": 1, **settings}), files))

        yield run


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """One server with the default settings for all tests that change nothing in it."""
    with running(Settings(workers=1, time_limit=20)) as running_server:
        yield running_server


@pytest.fixture
def judge() -> Iterator[Judge]:
    """A judge of a test's own."""
    with judging() as server:
        yield server
