"""Process 1 of the sandbox: starts the program without rights and watches it; when it ends, all processes end."""

import math
import os
import resource
import signal
import time
from typing import NoReturn

from iiverl_reward_client.verifiers.sandbox.launcher import filesystem, kernel, memory, seccomp
from iiverl_reward_client.verifiers.sandbox.launcher.spec import Spec, send

_MEMORY_CHECK_S = 0.05  # between memory checks
_GRACE_SECONDS = 10.0  # after the wall time, which the caller enforces
_OPEN_FILES = 256
_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": filesystem.SCRATCH,
    "TMPDIR": filesystem.SCRATCH,
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",  # the same program gets the same score
    "PYTHONDONTWRITEBYTECODE": "1",
    # One thread for libraries that start one per core, and few arenas of 64 MiB address space.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "2",
}


def supervise(spec: Spec, control: int, *, built: bool = False) -> NoReturn:
    """Build the file system (unless it is `built`), run the program, and report to `control` how it ended.

    When this process ends, the kernel kills all processes that are left.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    os.setsid()  # signals to the process group stay in the sandbox
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0)
    for stream in (1, 2):
        os.fchown(stream, filesystem.UID, filesystem.UID)  # so that /dev/stdout opens
    if not built:
        filesystem.enter(spec.source.encode("utf-8", "surrogatepass"), spec.prefix, spec.file_bytes)
    send(control, ready=True)
    program = os.fork()
    if program == 0:
        _become(spec, control, has_rights=not built)
    send(control, **_watch(program, spec))
    os._exit(0)


def _become(spec: Spec, control: int, *, has_rights: bool) -> NoReturn:
    """Turn this process into the program; `has_rights` is false if bubblewrap has dropped them."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, set())
        ours = (
            0 if os.geteuid() == 0 else 2
        )  # if all have the same uid, this process and the launcher count too
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
        if has_rights:
            _give_up_rights()
        _limit(spec, spec.processes + ours)
        seccomp.install()
        os.execve(spec.interpreter, [spec.interpreter, filesystem.PROGRAM], _ENVIRONMENT)
    except (OSError, ValueError) as error:
        send(control, error=f"start {spec.interpreter}: {error}")
    finally:
        os._exit(127)


def _give_up_rights() -> None:
    kernel.drop_bounding_set()
    os.setresgid(filesystem.UID, filesystem.UID, filesystem.UID)
    os.setresuid(filesystem.UID, filesystem.UID, filesystem.UID)
    kernel.drop_capabilities()


def _limit(spec: Spec, processes: int) -> None:
    """Set the limits that the kernel enforces; RLIMIT_NPROC only counts this namespace (Linux 5.14)."""
    cpu = math.ceil(spec.cpu_seconds)
    for limit, soft, hard in (
        (resource.RLIMIT_CPU, cpu, cpu + 1),  # SIGXCPU may be ignored, unlike SIGKILL a second later
        (resource.RLIMIT_NPROC, processes, processes),
        (resource.RLIMIT_FSIZE, spec.file_bytes, spec.file_bytes),
        (resource.RLIMIT_NOFILE, _OPEN_FILES, _OPEN_FILES),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        (resource.RLIMIT_AS, spec.memory_bytes, spec.memory_bytes),
    ):
        _lower(limit, soft, hard)


def _lower(limit: int, soft: int, hard: int) -> None:
    """Set a limit, but not above the caller's hard limit."""
    _, ceiling = resource.getrlimit(limit)
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(limit, (soft, hard))


def _watch(program: int, spec: Spec) -> dict[str, object]:
    """Wait for the end of the program, enforce time and memory, and reap orphans."""
    deadline = time.monotonic() + spec.wall_seconds + _GRACE_SECONDS
    while True:
        pid, status, usage = os.wait4(-1, os.WNOHANG)
        if pid == program:
            return _ending(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, spec)
        if pid:
            continue
        if time.monotonic() > deadline:
            return {"ended": "timeout"}
        if memory.used(spec.memory_bytes) > spec.memory_bytes:
            return {"ended": "memory"}
        signal.sigtimedwait({signal.SIGCHLD}, _MEMORY_CHECK_S)


def _ending(code: int, cpu_seconds: float, spec: Spec) -> dict[str, object]:
    if code >= 0:
        return {"ended": "exit", "exit_code": code}
    out_of_time = -code == signal.SIGXCPU or (-code == signal.SIGKILL and cpu_seconds >= spec.cpu_seconds)
    return {"ended": "timeout" if out_of_time else "signal"}
