"""Processes that run a user's code: they can be stopped at any time, and print to a file.

A process is started as `python -c "from MODULE import main; main(…)"`. It reads messages from its standard input and
answers each on its standard output (`UserProcess.ask`). A message is pickled, and preceded by its length in 8 bytes. The
user's code reads nothing, and all that it prints goes to standard error.
"""

import asyncio
import inspect
import mmap
import os
import pickle
import random
import signal
import struct
import sys
import tempfile
import zlib
from collections.abc import Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, Literal, Protocol, TypeAlias

from iiverl_core.orphans import end_with

LENGTH = struct.Struct("<q")
MAX_OUTPUT_BYTES = 64 * 2**20

USER_ERRORS = (Exception, SystemExit, asyncio.CancelledError)
"""Exceptions of user code that must not end the program."""

ProblemKind: TypeAlias = Literal["function", "timeout"]


class Answer(Protocol):
    """The answer to a message: `id` is the message's."""

    @property
    def id(self) -> int:
        """The id of the message."""
        ...


@dataclass(frozen=True, slots=True)
class Reply:
    """An `Answer` of any value, or of the `problem`: what the user's code did wrong."""

    id: int
    problem: str = ""
    value: Any = None


class EndedError(Exception):
    """The process ended before its answer."""


class UserProcess:
    """A process that runs a user's code, seen from the one that starts it: `ask` sends a message and awaits the answer.

    `module` has the function `main`, which is called with two file descriptors; see `begin`. If the process has ended,
    `how` says how.
    """

    def __init__(self, module: str) -> None:
        self.last_id = 0
        self.how = ""
        self.problem: ProblemKind = "function"
        self._module = module
        self._process: asyncio.subprocess.Process | None = None
        self._answers: dict[int, asyncio.Future[Any]] = {}
        with tempfile.TemporaryFile() as file:
            file.truncate(LENGTH.size)
            self._shared_fd = os.dup(file.fileno())
        self._shared = mmap.mmap(self._shared_fd, LENGTH.size)

    async def start(self, lifeline_fd: int, output: IO[bytes]) -> None:
        """Start the process, which ends when `lifeline_fd` does; what it prints goes to `output`."""
        fds = lifeline_fd, self._shared_fd
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-c",
                f"from {self._module} import main; main(*{fds})",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                pass_fds=fds,
                # Else the order of sets, and so perhaps a score, would differ between processes.
                env={"PYTHONHASHSEED": "0", **os.environ},
                start_new_session=True,  # Ctrl-C reaches the run only, and a group can be killed as one
            )
        finally:
            os.close(self._shared_fd)

    @property
    def running(self) -> int:
        """The id of the call whose code runs or was running at the end; 0 if none is."""
        return LENGTH.unpack_from(self._shared)[0]

    async def ask(self, id: int, message: Any) -> Any:
        """Send a message and return the `Answer` of this id.

        Raises:
            EndedError: the process ended.
        """
        if self.how or self._process is None or self._process.stdin is None:
            raise EndedError
        self._answers[id] = asyncio.get_running_loop().create_future()
        with suppress(ConnectionError):  # `read_answers` notices the end
            self._process.stdin.write(framed(message))
            await self._process.stdin.drain()
        try:
            return await self._answers[id]
        finally:
            del self._answers[id]

    async def read_answers(self) -> None:
        """Pass on answers until the process ends."""
        assert self._process is not None and self._process.stdout is not None
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = LENGTH.unpack(await self._process.stdout.readexactly(LENGTH.size))
                content = await self._process.stdout.readexactly(length)
                try:
                    answer: Answer = pickle.loads(content)
                except Exception:  # the user's code wrote something else there
                    self._end_group()
                    break
                if (future := self._answers.get(answer.id)) and not future.done():
                    future.set_result(answer)
        code = await self._process.wait()
        if self.problem != "timeout":
            self.how = f"ended its process ({_cause(code)})"
        self._end_group()  # what it may have started
        for future in self._answers.values():
            if not future.done():
                future.set_exception(EndedError())

    def kill(self, problem: ProblemKind) -> None:
        """End the process and all that it started."""
        self.problem = problem
        self._end_group()

    async def close(self) -> None:
        """End the process and wait until it has ended."""
        self._end_group()
        if self._process is not None:
            await self._process.wait()

    def _end_group(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)


def _cause(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"signal {-code}, {signal.Signals(-code).name}"


def begin(lifeline_fd: int, shared_fd: int) -> tuple[int, int, mmap.mmap]:
    """Begin, in the process itself: end with the starter, and keep the user's code from reading and printing.

    Returns the file descriptors of messages and of answers, and the memory for the id of the running call.
    """
    end_with(lifeline_fd)
    messages, answers = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    return messages, answers, mmap.mmap(shared_fd, LENGTH.size)


def read_message(fd: int) -> Any:
    """Read a message; None at the end."""
    head = _read_bytes(fd, LENGTH.size)
    content = head and _read_bytes(fd, LENGTH.unpack(head)[0])
    return content and pickle.loads(content)


def _read_bytes(fd: int, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        part = os.read(fd, min(size - len(parts), 2**20))
        if not part:
            return None
        parts += part
    return bytes(parts)


def write_answer(fd: int, answer: Answer) -> None:
    """Write an answer."""
    message = memoryview(framed(answer))
    while message:
        message = message[os.write(fd, message) :]


def framed(value: Any) -> bytes:
    """Pickle a message, preceded by its length."""
    message = pickle.dumps(value)
    return LENGTH.pack(len(message)) + message


def mark_running(shared: mmap.mmap, id: int) -> None:
    """Tell the starter that the code of call `id` runs; 0 for none."""
    LENGTH.pack_into(shared, 0, id)


def seed_random(seed: str) -> None:
    """Seed the global random numbers, so that they do not depend on which process makes a call, nor on earlier calls."""
    random.seed(seed)
    number = zlib.crc32(seed.encode())
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(number)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(number)


def awaited(returned: Any, runner: asyncio.Runner) -> Any:
    """Return what a function of the user's returned; of a coroutine function, its result."""
    return runner.run(_await(returned)) if inspect.isawaitable(returned) else returned


async def _await(returned: Awaitable[Any]) -> Any:
    return await returned


def bound_output() -> None:
    """Drop further output once the file that it goes to is large."""
    if os.fstat(1).st_size > MAX_OUTPUT_BYTES:
        os.write(1, b"\nFurther output is dropped.\n")
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        os.close(nothing)
