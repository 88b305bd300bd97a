"""A sandbox of our own: Linux namespaces, a seccomp filter and resource limits.

Contained, each held by the kernel unless it says otherwise:

- Rights: uid 65534 in a user namespace, with no capability (bounding set included), no_new_privs. Outside it is
  nobody where root starts it, else the user who starts it; never root.
- Files: `/usr` with its links, the interpreter's own folder, the linker's cache and five devices, all read-only;
  `/program/main.py`. It writes to `/scratch` (also `/tmp`, `/dev/shm`) alone: a tmpfs of `file_bytes`, at most
  16384 files, nothing in it executable. Standard input is a sealed file.
- Processes: a pid namespace, in which `/proc` shows its own processes and nothing else; at most `processes`, threads
  included. When the program ends, or is to end, process 1 is killed and the kernel kills all others with it. The
  same happens when the caller or the launcher dies.
- Network: none, loopback neither; a socket of any family but AF_UNIX is refused.
- Time: `cpu_seconds` for each process, `wall_seconds` by the caller for all.
- Memory: `memory_bytes` of address space for each process, and, by a look every 50 ms, of memory for all together.
- Output: `output_bytes`, by the caller.
- System calls: no tracing, namespaces, mounts, io_uring, BPF, keys, or memory outside processes and scratch files.
- Results: once the program runs, nothing that it does makes `run` raise.

Not contained:

- A fault of the kernel itself: the kernel is shared.
- CPU time of several processes together, other than by `wall_seconds` times the cores.
- Memory between two looks (at most `processes` times `memory_bytes`); pipe and socket buffers (256 open files a
  process). No cgroup is used.
- Reading what lies in `/usr` and in the interpreter's folder, with the packages installed there; what system calls
  tell of the machine (its name of kernel, its cores, its load, the places of its mounts); timing.
- Where root does not start it, the groups of the user stay, and Linux before 5.14 counts the processes of that user
  everywhere.

With bubblewrap `/proc` also shows the machine's figures (memory, load, the kernel's command line), and a program can
hide shared memory that no page table holds any more from the look.
"""

import contextlib
import fcntl
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iiverl_reward_client.verifiers.sandbox.launcher import seccomp
from iiverl_reward_client.verifiers.sandbox.launcher.spec import Spec, heard
from iiverl_reward_client.verifiers.sandbox.seam import (
    DEFAULT_LIMITS,
    Ending,
    Execution,
    Limits,
    SandboxError,
    SandboxUnavailable,
    UnsupportedLanguage,
)
from iiverl_reward_client.verifiers.sandbox.streams import Cut, Streams

_LAUNCHER = Path(__file__).parent / "launcher" / "__main__.py"
_START_SECONDS = 30.0
_STOP_SECONDS = 30.0


class NamespaceSandbox:
    """Runs Python programs by the interpreter that runs this, each in namespaces of its own.

    `bubblewrap` is the path of that program where it shall make the namespaces.

    Raises:
        SandboxUnavailable: this is not Linux, or a machine for which there is no system call filter.
    """

    def __init__(self, bubblewrap: str | None = None) -> None:
        self._how = bubblewrap or "own"
        if sys.platform != "linux":
            raise SandboxUnavailable(f"namespaces are Linux's, and this is {sys.platform}")
        if platform.machine() not in seccomp.MACHINES:
            raise SandboxUnavailable(f"no system call filter is written for {platform.machine()}")

    def run(
        self, source: str, stdin: str = "", *, language: str = "python", limits: Limits = DEFAULT_LIMITS
    ) -> Execution:
        """Run a Python program; see `Sandbox.run`."""
        if language not in ("python", "python3"):
            raise UnsupportedLanguage(
                f"the sandbox of namespaces runs Python, not {language!r}; Sandbox Fusion runs more (set its URL)"
            )
        control, told = os.pipe()
        try:
            launcher = _launch(_spec(source, limits), stdin, told, self._how)
        except OSError as error:
            os.close(control)
            raise SandboxError(f"cannot start the sandbox's launcher: {error}") from error
        finally:
            os.close(told)
        with launcher, os.fdopen(control, "rb", buffering=0), _stopped_at_last(launcher):
            return _attend(launcher, control, limits)


def _spec(source: str, limits: Limits) -> Spec:
    # A virtual environment's own interpreter may be a copy in a folder that the program does not see.
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


def _launch(spec: Spec, stdin: str, told: int, how: str) -> subprocess.Popen[bytes]:
    """Start the launcher, with nothing of this process but the files it needs."""
    with _sealed_file(spec.to_json()) as spec_file, _sealed_file(_encoded(stdin)) as given:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(_LAUNCHER), str(spec_file), str(told), how],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            pass_fds=(spec_file, told),
            start_new_session=True,
        )


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


@contextlib.contextmanager
def _sealed_file(content: bytes) -> Iterator[int]:
    """A file in memory that nobody can write to or grow any more, at its beginning."""
    with os.fdopen(os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb", 0) as file:
        rest = memoryview(content)
        while rest:
            rest = rest[file.write(rest) or 0 :]
        file.seek(0)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
        yield file.fileno()


@contextlib.contextmanager
def _stopped_at_last(launcher: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave no process behind, whatever happens.

    Raises:
        SandboxError: the kernel does not let the processes go.
    """
    try:
        yield
    finally:
        launcher.terminate()  # it kills process 1, the kernel everything else, and only then does it end
        try:
            launcher.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            launcher.kill()
            raise SandboxError(f"a sandbox did not end within {_STOP_SECONDS:.0f} s of its kill") from None


def _attend(launcher: subprocess.Popen[bytes], control: int, limits: Limits) -> Execution:
    """Wait for the program's start, then for its end or the end of what it may use."""
    assert launcher.stdout is not None and launcher.stderr is not None  # they are pipes
    out, err = launcher.stdout.fileno(), launcher.stderr.fileno()
    with contextlib.closing(Streams(out, err, control)) as streams:
        streams.read_line(control, time.monotonic() + _START_SECONDS)
        if not heard(streams.read[control]).get("ready"):
            _raise_for(heard(streams.read[control]), streams.read[err])
        cut = streams.read_until(time.monotonic() + limits.wall_seconds, (out, err), limits.output_bytes)
        message = heard(streams.read[control])
        if "error" in message:
            _raise_for(message, b"")
        ended = _ended(cut, message)
        stdout = bytes(streams.read[out][: limits.output_bytes]).decode("utf-8", "replace")
        stderr = bytes(streams.read[err][: limits.output_bytes]).decode("utf-8", "replace")
    return Execution(stdout, stderr, message.get("exit_code") if ended == "exit" else None, ended)


def _raise_for(message: dict[str, Any], stderr: bytes | bytearray) -> None:
    written = stderr.decode("utf-8", "replace").strip()
    raise SandboxError(
        message.get("error") or written or f"the sandbox did not start within {_START_SECONDS:.0f} s"
    )


def _ended(cut: Cut, message: dict[str, Any]) -> Ending:
    """Say how the program ended; once it runs, whatever becomes of process 1 is its doing, and no failure of ours."""
    if cut != "end":
        return "timeout" if cut == "time" else "output"
    return message.get("ended", "signal")
