"""Who the program is outside the sandbox, and what becomes of it when its caller is no more."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import iiverl_reward_client
from iiverl_reward_client.verifiers.sandbox import Sandbox

PACKAGES = Path(iiverl_reward_client.__file__).parents[1]

CALLER = """
import sys
from iiverl_reward_client.verifiers.sandbox.namespace_sandbox import NamespaceSandbox
print(NamespaceSandbox().run(sys.stdin.read()))
"""
SLEEPER = """
import os, time
if os.fork() == 0:
    os.setsid()
time.sleep(600)
"""


def children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for thread in threads for child in (thread / "children").read_text().split()]


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def inside(caller: int) -> list[int]:
    """The processes of the sandbox that `caller` runs: process 1, the program, and what it started."""
    found = [init for launcher in children(caller) for init in children(launcher)]
    for pid in found:
        found += children(pid)
    return found


@pytest.mark.parametrize("whom", ["caller", "launcher"])
def test_nothing_outlives_a_killed_caller_or_launcher(sandbox: Sandbox, whom: str) -> None:
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert caller.stdin is not None
    caller.stdin.write(SLEEPER.encode())
    caller.stdin.close()
    wait_for(lambda: len(inside(caller.pid)) == 3)
    pids = inside(caller.pid)
    if os.geteuid() == 0:
        for pid in pids[1:]:
            assert Path(f"/proc/{pid}").stat().st_uid != 0
            assert "\nUid:\t65534\t65534\t65534\t65534\n" in Path(f"/proc/{pid}/status").read_text()
    os.kill(caller.pid if whom == "caller" else children(caller.pid)[0], signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in pids))
    caller.wait(timeout=20)


# What a program finds and does where the caller has no rights either, so that its user is the program's too.
PROBE = """
import os, signal, time
print(os.getuid(), [n for n in range(3, 256) if os.path.exists(f'/proc/self/fd/{n}')])
for target in (1, -1):
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
        try: os.kill(target, number)
        except OSError: pass
for name in ('environ', 'mem', 'maps', 'fd/0', 'root/etc/passwd'):
    try: print(open(f'/proc/1/{name}', 'rb').read(1))
    except OSError: pass
n = 1
try:
    while n < 100:
        os.fork() or time.sleep(60)
        n += 1
except OSError:
    print(8 <= n <= 9, flush=True)
"""
FILLER = """
import mmap, os, time
os.fork() and os.fork()
kept = mmap.mmap(-1, 40 << 20)
for at in range(0, 40 << 20, 4096):
    kept[at] = 1
time.sleep(60)
"""
# The packages around the sandbox need what the system's Python has not; the sandbox of namespaces needs nothing.
WITHOUT_RIGHTS = f"""
import os, sys, types
os.setgroups([]); os.setgid(54321); os.setuid(54321)
for name in ('iiverl_reward_client', 'iiverl_reward_client.verifiers', 'iiverl_reward_client.verifiers.sandbox'):
    package = sys.modules[name] = types.ModuleType(name)
    package.__path__ = [{str(PACKAGES)!r} + '/' + name.replace('.', '/')]
from iiverl_reward_client.verifiers.sandbox.namespace_sandbox import NamespaceSandbox
from iiverl_reward_client.verifiers.sandbox.base import Limits
from iiverl_reward_client.verifiers.sandbox.self_test import leaks
sandbox = NamespaceSandbox(sys.argv[1] or None)
print(leaks(sandbox))
execution = sandbox.run({PROBE!r}, limits=Limits(processes=8, wall_seconds=5))
print(execution.stdout, execution.stderr, execution.ended, sep='')
print(sandbox.run({SLEEPER!r}, limits=Limits(wall_seconds=0.5)).ended)
print(sandbox.run({FILLER!r}, limits=Limits(wall_seconds=5, memory_bytes=64 << 20)).ended)
"""


def processes_of(uid: int) -> list[str]:
    line = f"\nUid:\t{uid}\t"
    return [str(process) for process in Path("/proc").glob("[0-9]*") if line in status_of(process)]


def status_of(process: Path) -> str:
    try:
        return (process / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("program", ["", "bwrap"])
def test_a_caller_without_rights_has_a_sandbox_too(sandbox: Sandbox, program: str) -> None:
    """By the system's own Python, since this one may lie where nobody else can read it."""
    bubblewrap = shutil.which(program) if program else ""
    if bubblewrap is None:
        pytest.skip("bubblewrap is not installed")
    python = "/usr/bin/python3"
    usable = subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], check=False)
    if usable.returncode:
        pytest.skip(f"{python} is too old")
    done = subprocess.run(
        [python, "-c", WITHOUT_RIGHTS, bubblewrap], capture_output=True, text=True, check=False, cwd="/"
    )
    if "Permission denied" in done.stderr:
        pytest.skip("the package lies where nobody else can read it")
    assert done.stdout == "[]\n65534 []\nTrue\nexit\ntimeout\nmemory\n", done.stderr
    assert processes_of(54321) == []
