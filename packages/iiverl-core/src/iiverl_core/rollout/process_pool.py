"""Processes of a user's file, which are killed if a call takes too long and used again otherwise."""

import asyncio
import threading
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from iiverl_core.errors import ConfigError
from iiverl_core.orphans import Lifeline
from iiverl_core.user_process import EndedError, Reply, UserProcess

T = TypeVar("T")

_STARTING_S = 60.0  # for a process to start and import the user's file, or more
_CLOSING_S = 5.0  # for what is being closed at the end of a run


class EnvironmentFailure(Exception):  # noqa: N818
    """What answers the model raised, hung, died or answered garbage; the message says which, with any traceback."""


class CallTimeout(EnvironmentFailure):
    """A call took too long."""


class ProcessPool:
    """Starts a process whenever none is idle, and keeps those that are put back.

    A process runs `module` and is sent `setup` first, for which it has `timeout_s` or a minute; `path` is the user's file, or module.
    The processes are served by a thread, so time limits hold while an engine computes. What they print is appended to the
    file `output`.
    """

    def __init__(self, module: str, setup: Any, path: str, timeout_s: float, output: Path) -> None:
        self._module, self._setup, self._path = module, setup, path
        self._timeout_s, self._output = max(timeout_s, _STARTING_S), output
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._lifeline: Lifeline | None = None
        self._processes: set[UserProcess] = set()
        self._idle: list[UserProcess] = []
        self._reading: set[asyncio.Task[None]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self.loaded: Any = None
        """What the processes answer to `setup`; None until one has."""

    def start(self) -> asyncio.AbstractEventLoop:
        """Start the pool's thread, if it does not run; it starts no process."""
        if self._loop is None:
            self._loop, self._lifeline = asyncio.new_event_loop(), Lifeline()
            self._thread = threading.Thread(
                target=self._loop.run_forever, name="iiverl-user-code", daemon=True
            )
            self._thread.start()
        return self._loop

    def close(self) -> None:
        """Await what `keep` was given, and end all processes. May be called twice."""
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
            raise RuntimeError("the pool of processes is closed")
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def keep(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine on the pool's thread, for whose end nobody waits until the pool is closed."""
        if self._loop is None:
            coroutine.close()
            return
        self._loop.call_soon_threadsafe(_start, coroutine, self._closing)

    async def take(self) -> UserProcess:
        """Return an idle process; on the pool's thread.

        Raises:
            ConfigError: the user's file, or what it is to define, cannot be loaded.
            EnvironmentFailure: loading it took too long, or ended the process.
        """
        while self._idle:
            if not (process := self._idle.pop()).how:
                return process
        process = UserProcess(self._module)
        assert self._lifeline is not None
        self._output.parent.mkdir(parents=True, exist_ok=True)
        with self._output.open("ab") as output:
            await process.start(self._lifeline.fd, output)
        _start(self._read(process), self._reading)
        what = f"importing {self._path}"
        try:
            reply: Reply = await ask(process, 0, self._setup, self._timeout_s, what)
        except asyncio.CancelledError:
            process.kill("timeout")
            raise
        if reply.problem:
            raise ConfigError(reply.problem)
        self.loaded = reply.value
        return process

    def put_back(self, process: UserProcess) -> None:
        """Take back a process that may be used again; on the pool's thread."""
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


def _start(coroutine: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
    task = asyncio.get_running_loop().create_task(coroutine)
    tasks.add(task)
    task.add_done_callback(tasks.discard)


async def ask(
    process: UserProcess, id: int, message: Any, limit_s: float, what: str, limit_name: str = ""
) -> Any:
    """Return the answer to a message; if it takes too long, kill the process.

    Raises:
        CallTimeout: it took too long.
        EnvironmentFailure: the process ended.
    """
    try:
        async with asyncio.timeout(limit_s):
            return await process.ask(id, message)
    except TimeoutError:
        process.kill("timeout")
        raise CallTimeout(f"{what} took longer than {limit_s:g} s{limit_name}") from None
    except EndedError:
        raise EnvironmentFailure(f"{what} {process.how or 'ended its process'}") from None
