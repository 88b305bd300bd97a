"""A sandbox of Linux namespaces, a seccomp filter and resource limits.

Contained, enforced by the kernel unless noted otherwise:

- Rights: uid 65534 in a user namespace, without capabilities (including the bounding set), no_new_privs. Outside it
  is nobody if root starts it, else the user who starts it; never root.
- Files: `/usr` with its links, the interpreter's folder, the linker's cache and five devices, all read-only;
  `/program/main.py`. It can only write to `/scratch` (also `/tmp`, `/dev/shm`): a tmpfs of `file_bytes`, at most
  16384 files, none executable. Standard input is a sealed file.
- Processes: a pid namespace, in which `/proc` only shows its own processes; at most `processes`, including threads.
  When the program ends or is stopped, process 1 is killed and the kernel kills all others with it. The same happens
  when the caller or the launcher dies.
- Network: none, not even loopback; sockets of families other than AF_UNIX are refused.
- Time: `cpu_seconds` per process; `wall_seconds` for all, enforced by the caller.
- Memory: `memory_bytes` of address space per process, and of memory for all together, checked every 50 ms.
- Output: `output_bytes`, enforced by the caller.
- System calls: no tracing, namespaces, mounts, io_uring, BPF, keys, or memory outside processes and scratch files.
- Results: nothing that the program does makes `run` raise.

Not contained:

- Bugs of the kernel, which is shared.
- CPU time of several processes together, except by `wall_seconds` times the cores.
- Memory between two checks (at most `processes` times `memory_bytes`); pipe and socket buffers (256 open files per
  process). No cgroup is used.
- Reading `/usr` and the interpreter's folder with its installed packages; what system calls reveal about the machine
  (kernel version, cores, load, mount points); timing.
- If root does not start it, the user's groups are kept, and Linux before 5.14 counts all processes of that user.

With bubblewrap `/proc` also shows the machine's figures (memory, load, the kernel's command line), and a program can
hide shared memory that no process has mapped any more.
"""

import contextlib
import fcntl
import os
import platform
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeAlias

from iiverl_reward_client.verifiers.sandbox.base import (
    DEFAULT_LIMITS,
    Ending,
    Execution,
    Limits,
    SandboxError,
    SandboxUnavailable,
    UnsupportedLanguage,
)
from iiverl_reward_client.verifiers.sandbox.launcher import seccomp
from iiverl_reward_client.verifiers.sandbox.launcher.spec import Spec, received

_LAUNCHER = Path(__file__).parent / "launcher" / "__main__.py"
_START_TIMEOUT_S = 30.0
_STOP_TIMEOUT_S = 30.0
_CHUNK = 1 << 16

_Limit: TypeAlias = Literal["none", "time", "size"]


class NamespaceSandbox:
    """Runs Python programs with the current interpreter, each in its own namespaces.

    `bubblewrap` is the path of that program if it should create the namespaces.

    Raises:
        SandboxUnavailable: this is not Linux, or there is no system call filter for the machine.
    """

    def __init__(self, bubblewrap: str | None = None) -> None:
        self._how = bubblewrap or "namespaces"
        if sys.platform != "linux":
            raise SandboxUnavailable(f"namespaces need Linux, and this is {sys.platform}")
        if platform.machine() not in seccomp.MACHINES:
            raise SandboxUnavailable(f"there is no system call filter for {platform.machine()}")

    def run(
        self, source: str, stdin: str = "", *, language: str = "python", limits: Limits = DEFAULT_LIMITS
    ) -> Execution:
        """Run a Python program; see `Sandbox.run`."""
        if language not in ("python", "python3"):
            raise UnsupportedLanguage(
                f"the sandbox of namespaces runs Python, not {language!r}; Sandbox Fusion runs more (set its URL)"
            )
        control, write_end = os.pipe()
        try:
            launcher = _launch(_spec(source, limits), stdin, write_end, self._how)
        except OSError as error:
            os.close(control)
            raise SandboxError(f"cannot start the sandbox's launcher: {error}") from error
        finally:
            os.close(write_end)
        with launcher, os.fdopen(control, "rb", buffering=0), _terminated(launcher):
            return _wait_for(launcher, control, limits)


def _spec(source: str, limits: Limits) -> Spec:
    # A virtual environment's interpreter may be a copy in a folder that the program cannot see.
    interpreter = getattr(sys, "_base_executable", sys.executable)
    return Spec(
        source=source,
        interpreter=os.path.realpath(interpreter),
        prefix=os.path.realpath(sys.base_prefix),
        parent=os.getpid(),
        cpu_seconds=limits.cpu_seconds,
        wall_seconds=limits.wall_seconds,
        memory_bytes=limits.memory_bytes,
        processes=limits.processes,
        file_bytes=limits.file_bytes,
    )


def _launch(spec: Spec, stdin: str, write_end: int, how: str) -> subprocess.Popen[bytes]:
    """Start the launcher, which inherits only the files it needs."""
    with _sealed_file(spec.to_json()) as spec_file, _sealed_file(_encoded(stdin)) as given:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(_LAUNCHER), str(spec_file), str(write_end), how],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=(spec_file, write_end),
            start_new_session=True,
        )


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@contextlib.contextmanager
def _sealed_file(content: bytes) -> Iterator[int]:
    """Create a read-only file in memory, positioned at its start."""
    with os.fdopen(os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb", 0) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) or 0 :]
        file.seek(0)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        yield file.fileno()


@contextlib.contextmanager
def _terminated(launcher: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave no process behind.

    Raises:
        SandboxError: the processes do not end.
    """
    try:
        yield
    finally:
        launcher.terminate()  # it kills process 1, the kernel all others, and then it ends
        try:
            launcher.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            launcher.kill()
            raise SandboxError(f"a sandbox did not end within {_STOP_TIMEOUT_S:.0f} s of its kill") from None


def _wait_for(launcher: subprocess.Popen[bytes], control: int, limits: Limits) -> Execution:
    """Wait for the start of the program, then for its end or a limit."""
    assert launcher.stdout is not None and launcher.stderr is not None  # they are pipes
    out, err = launcher.stdout.fileno(), launcher.stderr.fileno()
    with contextlib.closing(_Streams(out, err, control)) as streams:
        streams.read_line(control, time.monotonic() + _START_TIMEOUT_S)
        if not received(streams.read[control]).get("ready"):
            _raise_for(received(streams.read[control]), streams.read[err])
        limit = streams.read_until(time.monotonic() + limits.wall_seconds, (out, err), limits.output_bytes)
        message = received(streams.read[control])
        if "error" in message:
            _raise_for(message, b"")
        ended = _ended(limit, message)
        stdout = bytes(streams.read[out][: limits.output_bytes]).decode("utf-8", "surrogateescape")
        stderr = bytes(streams.read[err][: limits.output_bytes]).decode("utf-8", "surrogateescape")
    return Execution(stdout, stderr, message.get("exit_code") if ended == "exit" else None, ended)


def _raise_for(message: dict[str, Any], stderr: bytes | bytearray) -> None:
    written = stderr.decode("utf-8", "replace").strip()
    raise SandboxError(
        message.get("error") or written or f"the sandbox did not start within {_START_TIMEOUT_S:.0f} s"
    )


def _ended(limit: _Limit, message: dict[str, Any]) -> Ending:
    """Return how the program ended; once it runs, a killed process 1 is its own doing, not a failure of the sandbox."""
    if limit != "none":
        return "timeout" if limit == "time" else "output"
    return message.get("ended", "signal")


class _Streams:
    """Pipes of other processes that are read into memory together, each until its end."""

    def __init__(self, *pipes: int) -> None:
        self.read: dict[int, bytearray] = {pipe: bytearray() for pipe in pipes}
        self._selector = selectors.DefaultSelector()
        for pipe in pipes:
            self._selector.register(pipe, selectors.EVENT_READ)

    def close(self) -> None:
        """Close the selector; the caller closes the pipes."""
        self._selector.close()

    def read_line(self, pipe: int, deadline: float) -> None:
        """Read until `pipe` has a line, all pipes have ended, or the deadline (of `time.monotonic`) is over."""
        while b"\n" not in self.read[pipe] and self._open and self._read_some(deadline):
            pass

    def read_until(self, deadline: float, counted: tuple[int, ...], most: int) -> _Limit:
        """Read until all pipes end, the deadline is over, or `counted` together have more than `most` bytes."""
        while self._open:
            in_time = self._read_some(deadline)
            if sum(len(self.read[pipe]) for pipe in counted) > most:
                return "size"
            if not in_time:
                return "time"
        return "none"

    @property
    def _open(self) -> bool:
        return bool(self._selector.get_map())

    def _read_some(self, deadline: float) -> bool:
        """Wait for output and read it; return False if the deadline is over."""
        for key, _ in self._selector.select(max(0.0, deadline - time.monotonic())):
            chunk = os.read(key.fd, _CHUNK)
            if not chunk:
                self._selector.unregister(key.fd)
            self.read[key.fd] += chunk
        return time.monotonic() < deadline
