"""Worker processes that run one submission at a time, and are killed and replaced if it takes too long."""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iiverl_reward_client.verifiers.verifier import ResponseError, VerifierError

_log = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0  # seconds: a verifier may import a large library
_RESTART_DELAY_S = 1.0
_REPLY_BYTES = 16 * 2**20
_MEMORY_CHECK_S = 0.1


class VerifierProcessError(Exception):
    """A worker process could not load its function."""


@dataclass(frozen=True, slots=True)
class WorkerLimits:
    """Limits per submission: seconds of wall time, and bytes of resident memory (on Linux only).

    `response_seconds` is CPU time in the second stage of a `ReferenceFirst`.
    """

    seconds: float = 10.0
    response_seconds: float = 5.0
    memory_bytes: int = 2 * 2**30


class _ProcessEndedError(Exception):
    """A worker process ended before its reply, by this signal if it was one."""

    def __init__(self, code: int) -> None:
        self.signal = -code if code < 0 else None
        ended = f"ended with exit code {code}" if code >= 0 else f"was ended by signal {-code}"
        super().__init__(f"the verifier's process {ended}")


class WorkerPool:
    """Up to `size` processes that have loaded the function at `target` (see `worker`)."""

    def __init__(
        self, target: str, size: int, limits: WorkerLimits, hidden_variables: Sequence[str] = ()
    ) -> None:
        self._target = target
        self._size = size
        self._limits = limits
        self._hidden = frozenset(hidden_variables)
        self._idle: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()
        self._processes: set[asyncio.subprocess.Process] = set()
        self._start_bytes: dict[asyncio.subprocess.Process, int] = {}  # resident, once the function is loaded
        self._starting: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[int]] = set()
        self._count = 0  # of processes, including those that are starting
        self._closed = False

    async def start(self) -> None:
        """Start one process and check that it is usable; all others start on demand.

        Raises:
            VerifierProcessError: it is not usable.
        """
        self._idle.put_nowait(await self._start_process())
        self._count += 1

    async def call(self, message: dict[str, Any]) -> dict[str, Any]:
        """Send a message to an idle process, and return its reply.

        If it takes too long or too much memory, or ends the process, that process is replaced.

        Raises:
            ResponseError: that happened after the reference had been read, and not because of the machine.
            VerifierError: it happened before, or the machine was too busy.
        """
        line = json.dumps(message).encode() + b"\n"
        process = await self._take_idle()
        try:
            reply = await self._exchange(process, line)
        except BaseException:
            self._replace(process)
            raise
        if 2 * _resident_bytes(process.pid) > self._limits.memory_bytes + self._start_bytes[process]:
            self._replace(process)  # the next submission must not pay for what this one left behind
        else:
            self._idle.put_nowait(process)
        return reply

    async def close(self) -> None:
        """Kill all processes and their children, and wait until they are gone."""
        self._closed = True
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for process in list(self._processes):
            self._end(process)
        await asyncio.gather(*self._ending)

    async def _take_idle(self) -> asyncio.subprocess.Process:
        if self._idle.empty() and self._count < self._size:
            self._count += 1
            self._start_in_background()
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                while (process := await self._idle.get()).returncode is not None:
                    self._replace(process)  # it ended while idle
                return process
        except TimeoutError:
            raise VerifierError("server", "no worker process could be started") from None

    async def _exchange(self, process: asyncio.subprocess.Process, line: bytes) -> dict[str, Any]:
        """Send a line and await the reply within the limits."""
        replies = _Replies(process)
        answer = asyncio.create_task(replies.ask(line))
        watch = asyncio.create_task(_memory_above(process.pid, self._limits.memory_bytes))
        try:
            done, _ = await asyncio.wait(
                (answer, watch), timeout=self._limits.seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if answer in done:
                return await answer
        except _ProcessEndedError as ended:
            if not replies.reference_read or ended.signal == signal.SIGKILL:  # the kernel was out of memory
                raise VerifierError("server", str(ended)) from None
            if ended.signal == signal.SIGPROF:
                raise ResponseError("verifying the response took too long") from None
            raise ResponseError(str(ended)) from None
        finally:
            answer.cancel()
            watch.cancel()
        if watch in done:
            took = f"verifying took more than {self._limits.memory_bytes / 2**20:.0f} MiB of memory"
            raise ResponseError(took) if replies.reference_read else VerifierError("server", took)
        raise VerifierError("timeout", f"verifying took longer than {self._limits.seconds:g} s")

    def _replace(self, process: asyncio.subprocess.Process) -> None:
        self._end(process)
        if not self._closed:
            self._start_in_background()

    def _start_in_background(self) -> None:
        task = asyncio.create_task(self._restart())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    async def _restart(self) -> None:
        """Start processes until one is usable."""
        while True:
            try:
                self._idle.put_nowait(await self._start_process())
                return
            except (VerifierProcessError, OSError) as error:
                _log.error("a worker process for %s cannot start: %s", self._target, error)
                await asyncio.sleep(_RESTART_DELAY_S)

    async def _start_process(self) -> asyncio.subprocess.Process:
        # -P: do not import from the working directory.
        command = (sys.executable, "-P", "-m", "iiverl_reward_client.verifiers.worker")
        process = await asyncio.create_subprocess_exec(
            *command,
            self._target,
            str(self._limits.seconds),
            str(self._limits.response_seconds),
            str(self._limits.memory_bytes),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={key: value for key, value in os.environ.items() if key not in self._hidden},
            limit=_REPLY_BYTES,
            start_new_session=True,  # Ctrl-C only reaches the server, and killpg kills a worker with its children
        )
        self._processes.add(process)
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                message = json.loads(await _line(process))
        except BaseException as error:
            self._end(process)
            if isinstance(error, TimeoutError):
                raise VerifierProcessError(f"it was not ready after {_START_TIMEOUT_S:g} s") from None
            if isinstance(error, VerifierError | _ProcessEndedError):
                raise VerifierProcessError(str(error)) from None
            raise
        if "unusable" in message:
            self._end(process)
            raise VerifierProcessError(message["unusable"])
        self._start_bytes[process] = _resident_bytes(process.pid)
        return process

    def _end(self, process: asyncio.subprocess.Process) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        self._processes.discard(process)
        self._start_bytes.pop(process, None)
        task = asyncio.create_task(process.wait())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


class _Replies:
    """The lines with which a process answers one message; `reference_read` tells its stage."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.reference_read = False

    async def ask(self, line: bytes) -> dict[str, Any]:
        """Send a message and return the reply."""
        assert self._process.stdin is not None
        with suppress(ConnectionError):  # reported below, with the exit code
            self._process.stdin.write(line)
            await self._process.stdin.drain()
        while "stage" in (reply := json.loads(await _line(self._process))):
            self.reference_read = True
        return reply


async def _line(process: asyncio.subprocess.Process) -> bytes:
    assert process.stdout is not None
    try:
        line = await process.stdout.readline()
    except ValueError:
        raise VerifierError("server", f"a verifier's reply exceeds {_REPLY_BYTES} bytes") from None
    if not line:
        raise _ProcessEndedError(await process.wait())
    return line


async def _memory_above(pid: int, most: int) -> None:
    """Return once a process uses more than `most` bytes; never return without /proc."""
    while True:
        await asyncio.sleep(_MEMORY_CHECK_S)
        if _resident_bytes(pid) > most:
            return


def _resident_bytes(pid: int) -> int:
    """Return a process's resident memory; 0 without /proc, or if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
