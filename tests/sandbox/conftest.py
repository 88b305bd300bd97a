import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from iiverl_reward_client.verifiers.sandbox import Execution, Limits, Sandbox, find_sandbox

SMALL = Limits(
    cpu_seconds=3,
    wall_seconds=8,
    memory_bytes=128 << 20,
    processes=8,
    file_bytes=4 << 20,
    output_bytes=1 << 16,
)
# The program says in which pid namespace it is, so that the test can look who of it is left.
PRELUDE = "import os\nos.write(1, os.readlink('/proc/self/ns/pid').encode() + b'\\n')\n"


@pytest.fixture(scope="session")
def sandbox() -> Sandbox:
    """A sandbox of namespaces; skipped only where the system's own `unshare` cannot make one either."""
    kinds = ["--user", "--map-root-user", "--mount", "--pid", "--net", "--fork", "--mount-proc"]
    try:
        done = subprocess.run(["unshare", *kinds, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("this system has no `unshare`")
    if done.returncode:
        pytest.skip(f"this machine allows no user namespaces: {done.stderr.strip()}")
    return find_sandbox(None)


def pid_namespaces() -> set[str]:
    """The pid namespaces in which there is a process now."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.add(str((process / "ns" / "pid").readlink()))
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return found


@pytest.fixture(scope="session")
def hostile(sandbox: Sandbox) -> Callable[..., Execution]:
    """Run a program that means harm; see that none of it is left and that the sandbox still answers."""

    def run(program: str, stdin: str = "", **limits: float) -> Execution:
        execution = sandbox.run(PRELUDE + program, stdin, limits=replace(SMALL, **limits))
        namespace, _, stdout = execution.stdout.partition("\n")
        assert namespace.startswith("pid:["), execution
        assert namespace not in pid_namespaces(), "processes are left"
        assert sandbox.run("print('still here')", limits=SMALL).stdout == "still here\n"
        return replace(execution, stdout=stdout)

    return run
