"""A seccomp filter for what namespaces leave open: other network families, shared memory that no limit covers, and
kernel interfaces that programs in the sandbox do not need."""

import ctypes
import errno
import os
import struct

from iiverl_reward_client.verifiers.sandbox.launcher import kernel

_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
MACHINES = tuple(_AUDIT_ARCH)

# Name: number on x86_64, number on aarch64; from 424 on the numbers are the same on all architectures.
_FORBIDDEN = {
    # other processes
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    # memory that belongs to no process and no scratch file
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # wide interfaces of the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "syslog": (103, 116), "acct": (163, 89),
    "quotactl": (179, 60), "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "delete_module": (176, 106), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
}  # fmt: skip
_CLONE, _PRLIMIT64, _SOCKET, _SOCKETPAIR = (56, 220), (302, 261), (41, 198), (53, 199)
_CLONE3 = 435
_AF_UNIX = 1
_X32_BIT = 0x40000000

# Classic BPF: an instruction is a code, the jumps if true and if false, and a constant.
_Instruction = tuple[int, int, int, int]
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; the low half of the argument
_KILL, _ERRNO = 0x80000000, 0x00050000
_ALLOW: _Instruction = (_RETURN, 0, 0, 0x7FFF0000)
_REFUSE: _Instruction = (_RETURN, 0, 0, _ERRNO | errno.EPERM)


def program(machine: str) -> list[_Instruction]:
    """Build the filter for one of `MACHINES`: all calls are allowed except those named here."""
    column = MACHINES.index(machine)
    lines: list[_Instruction] = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),  # calls of another architecture have other numbers
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine == "x86_64":
        lines += [(_AT_LEAST, 0, 1, _X32_BIT), _REFUSE]
    for numbers in _FORBIDDEN.values():
        lines += [(_EQUAL, 0, 1, numbers[column]), _REFUSE]
    # clone3 has its flags in memory, which a filter cannot read; without it libc falls back to clone.
    lines += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)]
    lines += _first_argument(_CLONE[column], (_ANY_BIT, 0, 1, kernel.ALL_NAMESPACES))
    # A process may lower the limits of others with its uid, and so kill pid 1 if all have the same uid.
    lines += _first_argument(_PRLIMIT64[column], (_EQUAL, 1, 0, 0))
    # A network namespace blocks the internet, but not vsock or the kernel's cryptography.
    for call in (_SOCKET, _SOCKETPAIR):
        lines += _first_argument(call[column], (_EQUAL, 1, 0, _AF_UNIX))
    return [*lines, _ALLOW]


def _first_argument(number: int, test: _Instruction) -> list[_Instruction]:
    """Refuse or allow call `number`: `test` checks its first argument and jumps over 0 to refuse, over 1 to allow."""
    return [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, _ARGUMENT), test, _REFUSE, _ALLOW]


def install() -> None:
    """Install the filter permanently for this process and its children; requires no_new_privs."""
    lines = program(os.uname().machine)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    header = ctypes.create_string_buffer(struct.pack("HP", len(lines), ctypes.addressof(code)))
    kernel.prctl(kernel.PR_SET_SECCOMP, kernel.SECCOMP_MODE_FILTER, ctypes.addressof(header))
