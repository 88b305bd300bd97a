"""The interface of sandboxes: limits, executions and errors."""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

Ending: TypeAlias = Literal["exit", "signal", "timeout", "memory", "output"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one program.

    `cpu_seconds`: CPU time of each process; `wall_seconds`: from the program's start until everything is killed.
    `memory_bytes`: address space of each process, and the memory of all of them together.
    `processes`: processes and threads at a time. `file_bytes`: each file, and the whole scratch folder.
    `output_bytes`: standard output and standard error together.

    Raises:
        ValueError: a limit is not positive.
    """

    cpu_seconds: float = 10.0
    wall_seconds: float = 20.0
    memory_bytes: int = 1 << 30
    processes: int = 32
    file_bytes: int = 64 << 20
    output_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Execution:
    """How a program ended, and its output, decoded as UTF-8.

    Bytes that are not UTF-8 become unpaired surrogates ("surrogateescape"), which equal no text that a program can print;
    servers that decode the output themselves may do otherwise.

    `exit_code` is set if the program ended by itself (`ended` is `exit`); `timeout` is CPU or wall time. A program that
    runs out of address space gets a MemoryError and usually exits with it; `memory` means that it was killed because all
    its processes together used too much.
    """

    stdout: str
    stderr: str
    exit_code: int | None
    ended: Ending


class SandboxError(Exception):
    """The sandbox failed, whatever the program; it must not be scored."""


class SandboxUnavailable(SandboxError):  # noqa: N818
    """There is no sandbox on this machine; `reason` says why and what to do about it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UnsupportedLanguage(SandboxError):  # noqa: N818
    """The sandbox does not run programs in this language."""


DEFAULT_LIMITS = Limits()


class Sandbox(Protocol):
    """Runs untrusted programs in isolation."""

    def run(
        self, source: str, stdin: str = "", *, language: str = "python", limits: Limits = DEFAULT_LIMITS
    ) -> Execution:
        """Run `source` with `stdin` as its standard input; block until all its processes are gone.

        May be called from several threads at once.

        Raises:
            UnsupportedLanguage: this sandbox cannot run `language`.
            SandboxError: the sandbox itself failed. Nothing that the program does raises.
        """
        ...
