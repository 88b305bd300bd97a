"""The system call filter, for each machine, read by an interpreter of its own."""

import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iiverl_reward_client.verifiers.sandbox.launcher import seccomp

ALLOW, KILL = 0x7FFF0000, 0x80000000
REFUSE, MISSING = 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
READ, PTRACE, CLONE = (
    {"x86_64": 0, "aarch64": 63},
    {"x86_64": 101, "aarch64": 117},
    {"x86_64": 56, "aarch64": 220},
)
SOCKETPAIR = {"x86_64": 53, "aarch64": 199}
SOCKET, PRLIMIT = {"x86_64": 41, "aarch64": 198}, {"x86_64": 302, "aarch64": 261}
CLONE3, IO_URING_SETUP, UNSHARE = 435, 425, {"x86_64": 272, "aarch64": 97}
machines = pytest.mark.parametrize("machine", ["x86_64", "aarch64"])


def verdict(machine: str, number: int, first: int = 0, arch: int | None = None) -> int:
    """What the kernel would do with this call: classic BPF over struct seccomp_data."""
    data = struct.pack("IIQQ", number, ARCH[machine] if arch is None else arch, 0, first)
    lines, accumulator, at = seccomp.program(machine), 0, 0
    while True:
        code, if_true, if_false, constant = lines[at]
        at += 1
        if code == 0x20:
            accumulator = struct.unpack_from("I", data, constant)[0]
        elif code == 0x06:
            return constant
        else:
            holds = {
                0x15: accumulator == constant,
                0x35: accumulator >= constant,
                0x45: accumulator & constant,
            }
            at += if_true if holds[code] else if_false


@machines
def test_what_is_refused_and_what_is_not(machine: str) -> None:
    fork_flags, thread_flags = 0x01200011, 0x003D0F00
    assert verdict(machine, READ[machine]) == ALLOW
    assert verdict(machine, PTRACE[machine]) == verdict(machine, UNSHARE[machine]) == REFUSE
    assert verdict(machine, IO_URING_SETUP) == REFUSE
    assert verdict(machine, CLONE3) == MISSING
    assert (
        verdict(machine, CLONE[machine], fork_flags)
        == verdict(machine, CLONE[machine], thread_flags)
        == ALLOW
    )
    assert verdict(machine, PRLIMIT[machine], 0) == verdict(machine, SOCKET[machine], 1) == ALLOW
    assert verdict(machine, PRLIMIT[machine], 1) == REFUSE


@machines
@given(bit=st.sampled_from([17, 25, 26, 27, 28, 29, 30]), others=st.integers(0, 2**32 - 1))
def test_no_clone_makes_a_namespace(machine: str, bit: int, others: int) -> None:
    assert verdict(machine, CLONE[machine], others | 1 << bit) == REFUSE


@machines
@given(family=st.integers(0, 50) | st.integers(0, 2**32 - 1))
def test_sockets_are_unix_sockets(machine: str, family: int) -> None:
    expected = ALLOW if family == 1 else REFUSE
    assert (
        verdict(machine, SOCKET[machine], family) == verdict(machine, SOCKETPAIR[machine], family) == expected
    )


@machines
@given(number=st.integers(0, 2**32 - 1), arch=st.integers(0, 2**32 - 1))
def test_a_call_of_another_architecture_is_the_end(machine: str, number: int, arch: int) -> None:
    if arch != ARCH[machine]:
        assert verdict(machine, number, arch=arch) == KILL


@given(number=st.integers(0x40000000, 2**32 - 1))
def test_the_second_numbering_of_x86_is_refused(number: int) -> None:
    assert verdict("x86_64", number) == REFUSE


@machines
@given(number=st.integers(0, 600), first=st.integers(0, 2**32 - 1))
def test_every_call_has_a_verdict(machine: str, number: int, first: int) -> None:
    assert verdict(machine, number, first) in (ALLOW, REFUSE, MISSING)
