"""Environments in processes of their own, which are killed if a call takes too long and used again otherwise."""

import asyncio
import sys
import threading
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from iiverl_core import activity
from iiverl_core.config.sections.multi_turn import EnvironmentConfig
from iiverl_core.config.sections.rollout import ROLLOUT
from iiverl_core.environment_process import Answered, Call, Reply, Setup
from iiverl_core.errors import ConfigError
from iiverl_core.orphans import Lifeline
from iiverl_core.user_process import EndedError, UserProcess

T = TypeVar("T")

_STARTING_S = 60.0  # for a process to start and import the user's file, or more
_CLOSING_S = 5.0  # for environments that are being closed at the end of a run


class EnvironmentFailure(Exception):  # noqa: N818
    """An environment raised, hung, died or answered garbage; the message says which, with the user's traceback."""


class EnvironmentPool:
    """Starts a process for each environment that is open at a time, and uses it again when that is closed.

    The processes are served by a thread, so time limits hold while an engine computes. What environments print is
    appended to the file `output`.
    """

    def __init__(self, config: EnvironmentConfig, output: Path) -> None:
        assert config.path is not None
        self.config = config
        self._setup = Setup(list(sys.path), config.path, config.name, config.kwargs)
        self._output = output
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lifeline: Lifeline | None = None
        self._processes: set[UserProcess] = set()
        self._idle: list[UserProcess] = []
        self._reading: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()

    def open(self, seed: str) -> "OpenEnvironment":
        """Open an environment whose random numbers depend on `seed`; its process is started by the first call."""
        if self._loop is None:
            self._loop, self._lifeline = asyncio.new_event_loop(), Lifeline()
            self._thread = threading.Thread(
                target=self._loop.run_forever, name="iiverl-environments", daemon=True
            )
            self._thread.start()
        return OpenEnvironment(self, seed)

    def close(self) -> None:
        """Close environments that are open, and end all processes. May be called twice."""
        if self._loop is None or self._thread is None or self._lifeline is None:
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._lifeline.close()
        self._loop = self._thread = self._lifeline = None

    async def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the pool's thread, and await its result on the caller's."""
        if self._loop is None:
            coroutine.close()
            raise RuntimeError("the pool of environments is closed")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine on the pool's thread, for whose end nobody waits until the pool is closed."""
        if self._loop is None:
            coroutine.close()
            return
        self._loop.call_soon_threadsafe(_start, coroutine, self._closing)

    async def take(self) -> UserProcess:
        """Return a process that runs no environment; on the pool's thread.

        Raises:
            ConfigError: the class cannot be loaded.
            EnvironmentFailure: loading it took too long, or ended the process.
        """
        while self._idle:
            if not (process := self._idle.pop()).how:
                return process
        process = UserProcess("iiverl_core.environment_process")
        assert self._lifeline is not None
        self._output.parent.mkdir(parents=True, exist_ok=True)
        with self._output.open("ab") as output:
            await process.start(self._lifeline.fd, output)
        _start(self._read(process), self._reading)
        limit = max(self.config.turn_timeout, _STARTING_S)
        try:
            reply: Reply = await ask(process, 0, self._setup, limit, f"importing {self._setup.path}")
        except asyncio.CancelledError:
            process.kill("timeout")
            raise
        if reply.problem:
            raise ConfigError(reply.problem)
        return process

    def put_back(self, process: UserProcess) -> None:
        """Take back a process that may run another environment; on the pool's thread."""
        self._idle.append(process)

    async def _read(self, process: UserProcess) -> None:
        self._processes.add(process)
        await process.read_answers()
        self._processes.discard(process)

    async def _end(self) -> None:
        await asyncio.sleep(0)  # start what `keep` was given
        if self._closing:
            await asyncio.wait(self._closing, timeout=_CLOSING_S)
        await asyncio.gather(*(process.close() for process in self._processes))
        if remaining := self._reading | self._closing:
            await asyncio.wait(remaining)


class OpenEnvironment:
    """One environment: `reset` once, then `step` after `step`; `close` in any case.

    Calls raise `EnvironmentFailure`, after which only `close` may follow.
    """

    def __init__(self, pool: EnvironmentPool, seed: str) -> None:
        self._pool, self._seed = pool, seed
        self._process: UserProcess | None = None
        self._calls = 0
        self._left_s = pool.config.rollout_timeout
        self._idle = True

    async def reset(self, row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """Make the environment, and return the first messages; None for the row's prompt."""
        return await self._pool.run(self._call("reset", row))

    async def step(self, message: Mapping[str, Any]) -> Answered:
        """Return the answer to a message."""
        return await self._pool.run(self._call("step", message))

    def close(self) -> None:
        """Let the environment close itself, without waiting for it; its process ends if a call is still running."""
        self._pool.keep(self._close())

    async def _call(self, method: Literal["reset", "step", "close"], argument: Any = None) -> Any:
        process = self._process = self._process or await self._pool.take()
        process.last_id += 1
        config = self._pool.config
        call = Call(process.last_id, f"{self._seed}/call {self._calls}", method, argument)
        self._calls += 1
        limit = min(config.turn_timeout, self._left_s)
        key = "turn_timeout" if limit == config.turn_timeout else "rollout_timeout"
        began = time.monotonic()
        self._idle = False
        what = f"{config.name}.{method}"
        reply: Reply = await ask(
            process, call.id, call, limit, what, f" ({ROLLOUT}.multi_turn.environment.{key})"
        )
        self._idle = True
        self._left_s -= time.monotonic() - began
        activity.advance()
        if reply.problem:
            raise EnvironmentFailure(reply.problem)
        return reply.value

    async def _close(self) -> None:
        if self._process is None:
            return
        self._left_s = self._pool.config.turn_timeout
        if self._idle:
            with suppress(EnvironmentFailure):
                await self._call("close")
        if self._idle:
            self._pool.put_back(self._process)
        else:
            self._process.kill("timeout")


def _start(coroutine: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    task = asyncio.get_running_loop().create_task(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def ask(
    process: UserProcess, id: int, message: Any, limit_s: float, what: str, limit_name: str = ""
) -> Any:
    """Return the answer to a message; if it takes too long, kill the process.

    Raises:
        EnvironmentFailure: it took too long, or the process ended.
    """
    try:
        async with asyncio.timeout(limit_s):
            return await process.ask(id, message)
    except TimeoutError:
        process.kill("timeout")
        raise EnvironmentFailure(f"{what} took longer than {limit_s:g} s{limit_name}") from None
    except EndedError:
        raise EnvironmentFailure(f"{what} {process.how or 'ended its process'}") from None
