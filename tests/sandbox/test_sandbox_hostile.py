"""Hostile programs: each is contained, nothing of it is left, and the sandbox answers the next caller.

The fixture `hostile` checks the last two after every program. Should one get out, its own bounds (how many
processes, how many bytes) keep the machine up.
"""

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from iiverl_reward_client.verifiers.sandbox import Execution, Sandbox

Hostile = Callable[..., Execution]

# `refused(what)` runs a function and says what became of it.
REFUSED = """
import ctypes, errno, signal, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)

def refused(act):
    try:
        result = act()
    except OSError as error:
        print("refused", errno.errorcode[error.errno])
    else:
        print("got", repr(result)[:200])

def call(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
"""


def all_refused(execution: Execution, times: int) -> None:
    lines = execution.stdout.splitlines()
    assert len(lines) == times and all(line.startswith("refused") for line in lines), execution


# Processes


def test_a_fork_bomb(hostile: Hostile) -> None:
    bomb = "import time\nend = time.time() + 60\nwhile time.time() < end:\n try: os.fork()\n except OSError: time.sleep(0.01)"
    assert hostile(bomb, wall_seconds=0.8).ended == "timeout"


@pytest.mark.parametrize(
    "start",
    ["os.fork() or time.sleep(60)", "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"],
)
def test_processes_and_threads_are_counted_together(hostile: Hostile, start: str) -> None:
    program = (
        "import threading, time\nn = 1\n"
        f"try:\n while n < 100:\n  {start}\n  n += 1\n"
        "except (OSError, RuntimeError): pass\n"
        "print(n, flush=True)\nos._exit(0)"
    )
    assert hostile(program, processes=8, memory_bytes=1 << 30).stdout == "8\n"


def test_a_daemon_left_behind(hostile: Hostile) -> None:
    began = time.monotonic()
    program = "import time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(600)\n os._exit(0)\nprint('gone')"
    execution = hostile(program)
    assert (execution.stdout, execution.exit_code) == ("gone\n", 0)
    assert time.monotonic() - began < 5


def test_a_program_that_ignores_every_signal(hostile: Hostile) -> None:
    program = """
import signal, time
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
if os.fork() == 0:
    os.setsid()
    if os.fork() != 0:
        os._exit(0)
time.sleep(600)
"""
    assert hostile(program, wall_seconds=0.5).ended == "timeout"


def test_a_program_that_spins_and_ignores_the_end_of_its_cpu_time(hostile: Hostile) -> None:
    program = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert hostile(program, cpu_seconds=1, wall_seconds=20).ended == "timeout"


@pytest.mark.parametrize(
    "program",
    [
        "import signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        "import time\nos.closerange(0, 256)\ntime.sleep(600)",
    ],
)
def test_a_program_that_stops_or_closes_its_files(hostile: Hostile, program: str) -> None:
    assert hostile(program, wall_seconds=0.5).ended == "timeout"


def test_killing_its_parents(hostile: Hostile) -> None:
    program = """
import signal, resource
for target in (1, os.getppid(), -1):
    for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM, signal.SIGINT):
        try: os.kill(target, number)
        except OSError: pass
try: resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))
except OSError: pass
print('alive', flush=True)
os.killpg(0, signal.SIGKILL)
"""
    execution = hostile(program)
    assert (execution.stdout, execution.ended) == ("alive\n", "signal")


def test_tracing_and_reading_other_processes(hostile: Hostile) -> None:
    program = REFUSED + (
        "parent = os.getppid()\n"
        "refused(lambda: call('ptrace', 16, parent, 0, 0))\n"
        "refused(lambda: call('ptrace', 0, 0, 0, 0))\n"
        "for name in ('environ', 'mem', 'maps', 'root/etc/passwd', 'cwd/x', 'fd/0'):\n"
        "    refused(lambda: open(f'/proc/{parent}/{name}', 'rb').read(10))\n"
        "refused(lambda: os.listdir(f'/proc/{parent}/fd'))\n"
    )
    all_refused(hostile(program), 9)


def test_it_sees_no_process_of_the_machine_and_no_file_of_the_launcher(hostile: Hostile) -> None:
    program = (
        "pids = [p for p in os.listdir('/proc') if p.isdigit()]\n"
        "print(set(pids) <= {'1', str(os.getpid())}, [n for n in range(3, 256) if os.path.exists(f'/proc/self/fd/{n}')])"
    )
    assert hostile(program).stdout == "True []\n"


def test_no_result_can_be_told_for_the_sandbox(hostile: Hostile) -> None:
    program = """
for descriptor in range(256):
    try: os.write(descriptor, b'{"error": "the sandbox failed", "ended": "exit", "exit_code": 0}\\n')
    except OSError: pass
os._exit(3)
"""
    assert hostile(program).exit_code == 3


# Network


def test_the_network_is_closed_to_loopback_and_outside(hostile: Hostile) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as abstract:
        name = f"\0iiverl-sandbox-{os.getpid()}"
        abstract.bind(name)
        abstract.listen()
        port = server.getsockname()[1]
        program = REFUSED + (
            f"for host in ('127.0.0.1', '0.0.0.0', '192.0.2.1'):\n"
            f"    refused(lambda: socket.create_connection((host, {port}), 2))\n"
            f"refused(lambda: socket.create_connection(('::1', {port}), 2))\n"
            f"refused(lambda: socket.socket(socket.AF_UNIX).connect({name!r}))\n"
            "for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK, socket.AF_ALG):\n"
            "    refused(lambda: socket.socket(family, socket.SOCK_DGRAM))\n"
        )
        all_refused(hostile(program), 11)


# Files


def test_the_servers_files_and_environment_are_out_of_sight(
    hostile: Hostile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "s3cret-of-the-server")
    secret = tmp_path / "secret"
    secret.write_text("s3cret-of-the-server")
    for folder in tmp_path.parents[:3]:
        if folder.stat().st_uid == os.geteuid() and folder != Path("/tmp"):
            folder.chmod(0o755)  # so that it is not its mode that hides the file
    program = REFUSED + (
        f"for path in ({str(secret)!r}, {__file__!r}, '/etc/shadow', '/etc/hostname', '/proc/1/environ', '/proc/kcore',\n"
        "             '/proc/cmdline', '/proc/meminfo', '/sys/kernel', '/proc/1/root', '/dev/mem', '/dev/vda', '/dev/tty'):\n"
        "    refused(lambda: open(path).read() if not os.path.isdir(path) else os.listdir(path))\n"
        "os.symlink('/proc/self/' + 'root/../../etc/shadow', 'link')\n"
        "refused(lambda: open('link').read())\n"
        "print('SECRET_TOKEN' in os.environ, 's3cret' in open('/proc/self/environ').read(), file=sys.stderr)\n"
    )
    execution = hostile(program)
    all_refused(execution, 14)
    assert execution.stderr == "False False\n"


def test_writing_outside_the_scratch_folder(hostile: Hostile) -> None:
    program = REFUSED + (
        "places = ['/', '/usr', '/usr/lib', '/etc', '/dev', '/proc/self', '/program', sys.prefix]\n"
        "for place in places: refused(lambda: open(place + '/written', 'w'))\n"
        "for file in ('/etc/passwd', '/program/main.py', sys.executable, '/proc/self/oom_score_adj', '/proc/self/uid_map'):\n"
        "    refused(lambda: open(file, 'r+'))\n"
        "refused(lambda: os.mknod('node', 0o20666, os.makedev(1, 1)))\n"
        "refused(lambda: open('/dev/stdin', 'r+b', 0).write(b'x'))\n"
        "refused(lambda: os.ftruncate(0, 1 << 20))\n"
    )
    all_refused(hostile(program, "stdin"), 16)


def test_setuid_files_and_greater_rights(hostile: Hostile) -> None:
    program = REFUSED + (
        "import shutil, subprocess\n"
        "shutil.copy('/bin/sh', 'sh'); os.chmod('sh', 0o6755)\n"
        "refused(lambda: subprocess.run(['./sh', '-c', 'id']))\n"
        "for act in (os.setuid, os.setgid): refused(lambda: act(0))\n"
        "refused(lambda: os.setgroups([0]))\n"
        "refused(lambda: os.chown('sh', 0, 0))\n"
        "refused(lambda: os.chroot('/'))\n"
        "refused(lambda: socket.sethostname('mine'))\n"
        "for kind in (0x10000000, 0x20000, 0x40000000): refused(lambda: call('unshare', kind))\n"
        "refused(lambda: call('mount', b'none', b'/scratch', b'tmpfs', 0, None))\n"
        "refused(lambda: call('umount2', b'/scratch', 2))\n"
        "refused(lambda: call('syscall', 435, 0, 0))\n"
        "refused(lambda: call('syscall', 425, 8, 0))\n"
    )
    all_refused(hostile(program), 14)


def test_setuid_programs_of_the_system_gain_nothing(hostile: Hostile) -> None:
    program = "import subprocess\nprint(subprocess.run(['su', '-c', 'id'], stdin=subprocess.DEVNULL, capture_output=True).returncode != 0)"
    assert hostile(program).stdout == "True\n"


@pytest.mark.parametrize(
    "fill",
    [
        "open(str(n), 'wb').write(bytes(1 << 20))",
        "file.write(bytes(1 << 20)); file.flush()",
        "open('/dev/shm/' + str(n), 'wb').write(bytes(1 << 20))",
        "os.truncate('file', n << 20)",
    ],
)
def test_filling_the_disk(hostile: Hostile, fill: str) -> None:
    program = f"file = open('file', 'wb')\nn = 0\ntry:\n while n < 64:\n  {fill}\n  n += 1\nexcept OSError: print(n)"
    assert int(hostile(program, file_bytes=4 << 20).stdout) <= 5


def test_a_great_many_empty_files(hostile: Hostile) -> None:
    program = "n = 0\ntry:\n while n < 50000:\n  os.mknod(str(n))\n  n += 1\nexcept OSError: print(n)"
    assert int(hostile(program).stdout) <= 16384


# Memory


def test_one_process_that_fills_the_memory(hostile: Hostile) -> None:
    execution = hostile("kept = []\nwhile len(kept) < 1024: kept.append(bytearray(1 << 20))")
    assert (execution.exit_code, execution.ended) == (1, "exit")
    assert "MemoryError" in execution.stderr


@pytest.mark.parametrize(
    ("flags", "then"),
    [
        ("mmap.MAP_PRIVATE", "pass"),
        ("mmap.MAP_SHARED", "pass"),
        ("mmap.MAP_SHARED", "kept.madvise(mmap.MADV_DONTNEED)"),  # shared pages stay, outside all page tables
    ],
)
def test_many_processes_that_fill_the_memory_together(hostile: Hostile, flags: str, then: str) -> None:
    program = f"""
import mmap, time
for _ in range(4):
    if os.fork() == 0:
        kept = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_ANONYMOUS | {flags})
        for at in range(0, 64 << 20, 4096):
            kept[at] = 1
        {then}
        time.sleep(600)
time.sleep(600)
"""
    assert hostile(program, memory_bytes=128 << 20).ended == "memory"


def test_pages_shared_by_many_count_once(hostile: Hostile) -> None:
    program = """
kept = bytearray(40 << 20)
children = [os.fork() or os._exit(__import__('time').sleep(0.4) or 0) for _ in range(4)]
print([os.waitpid(child, 0)[1] for child in children])
"""
    assert hostile(program, memory_bytes=100 << 20).stdout == "[0, 0, 0, 0]\n"


def test_memory_that_would_belong_to_no_process(hostile: Hostile) -> None:
    program = REFUSED + (
        "refused(lambda: os.memfd_create('hidden'))\n"
        "refused(lambda: call('shmget', 0, 1 << 20, 0o1666))\n"
        "refused(lambda: call('msgget', 0, 0o1666))\n"
        "refused(lambda: call('mlockall', 3))\n"
    )
    all_refused(hostile(program), 4)


# Output, recursion, and all at once


@pytest.mark.parametrize("streams", ["1", "2", "1, 2"])
def test_endless_output(hostile: Hostile, streams: str) -> None:
    execution = hostile(
        f"while True:\n for stream in ({streams},): os.write(stream, b'y' * 4096)", output_bytes=1 << 16
    )
    assert execution.ended == "output"
    assert len(execution.stdout) + len(execution.stderr) <= 2 << 16


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        "import ctypes\nctypes.string_at(0)",
        "try: eval('(' * 10**6)\nexcept (SyntaxError, MemoryError): os._exit(1)",
        "x = None\nfor _ in range(10**6): x = [x]\nrepr(x)",
    ],
)
def test_deep_recursion_and_crashes(hostile: Hostile, program: str) -> None:
    execution = hostile(program, memory_bytes=64 << 20)
    assert execution.ended == "signal" or execution.exit_code == 1, execution


def test_limits_that_it_lowers_are_its_own(hostile: Hostile) -> None:
    program = "import resource\nfor n in range(16): resource.setrlimit(n, (0, 0))\nos.fork()"
    assert hostile(program).ended in ("exit", "signal", "timeout")


def test_ordinary_callers_are_answered_while_bombs_go_off(hostile: Hostile, sandbox: Sandbox) -> None:
    bomb = "import time\nend = time.time() + 60\nwhile time.time() < end:\n try: os.fork()\n except OSError: time.sleep(0.01)"
    with ThreadPoolExecutor(4) as pool:
        bombs = [pool.submit(hostile, bomb, wall_seconds=0.8) for _ in range(3)]
        answers = [sandbox.run("print(int(input()) + 1)", str(n)).stdout for n in range(4)]
        assert [bomb.result().ended for bomb in bombs] == ["timeout"] * 3
    assert answers == ["1\n", "2\n", "3\n", "4\n"]
