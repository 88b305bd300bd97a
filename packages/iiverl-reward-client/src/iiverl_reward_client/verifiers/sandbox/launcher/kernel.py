"""Linux system calls that Python 3.11 has no functions for, such as `unshare` and `mount`."""

import ctypes
import errno
import os
import struct

_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
ALL_NAMESPACES = _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWUSER | _NEWPID | _NEWNET

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP = 1, 4, 22
PR_CAPBSET_DROP, PR_SET_SECUREBITS, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 24, 28, 36, 38
SECCOMP_MODE_FILTER = 2
# Uid 0 has no rights, and no capability is ambient or kept after a change of uid; all locked.
_SECUREBITS_NOTHING_FOR_ROOT = 0b11_10_10_11

_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_SYS_MOUNT_SETATTR = 442  # the same number on every architecture
_SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Move this process (for pids: its children) to new namespaces."""
    _checked(_libc.unshare(ctypes.c_int(flags)), "new namespaces")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount `source` on `target`; `flags` are MS_*."""
    result = _libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    _checked(result, f"mount {kind or source} on {target}")


def detach(target: str) -> None:
    """Unmount a mount and everything below it, lazily."""
    _checked(_libc.umount2(target.encode(), MNT_DETACH), f"unmount {target}")


def restrict_mount(target: str, flags: int, *, recursive: bool) -> None:
    """Add restrictions (MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC) to a mount, optionally recursively."""
    attributes = struct.pack("QQQQ", flags, 0, 0, 0)  # MOUNT_ATTR_* have the same values
    result = _libc.syscall(
        ctypes.c_long(_SYS_MOUNT_SETATTR),
        ctypes.c_long(_AT_FDCWD),
        target.encode(),
        ctypes.c_long(_AT_RECURSIVE if recursive else 0),
        attributes,
        ctypes.c_long(len(attributes)),
    )
    _checked(result, f"restrict the mount {target}")


def pivot_root(new_root: str, put_old: str) -> None:
    """Make `new_root` the root of this mount namespace; the old root moves to `put_old`."""
    number = ctypes.c_long(_SYS_PIVOT_ROOT[os.uname().machine])
    _checked(_libc.syscall(number, new_root.encode(), put_old.encode()), f"pivot_root to {new_root}")


def set_host_name(name: str) -> None:
    """Set the host name in this namespace; importing the module `socket` would be slow."""
    _checked(_libc.sethostname(name.encode(), ctypes.c_size_t(len(name))), "set the host name")


def prctl(option: int, first: int, second: int = 0) -> None:
    """Set an attribute of this process."""
    arguments = [ctypes.c_ulong(value) for value in (first, second, 0, 0)]
    _checked(_libc.prctl(ctypes.c_int(option), *arguments), f"prctl {option}")


def die_with_parent(signal_number: int, parent: int) -> None:
    """Get a signal when the parent ends, immediately if it has. A change of rights undoes this."""
    prctl(PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal_number)


def drop_bounding_set() -> None:
    """Make it impossible to gain capabilities by executing a file; requires CAP_SETPCAP."""
    prctl(PR_SET_SECUREBITS, _SECUREBITS_NOTHING_FOR_ROOT)
    capability = 0
    while True:
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno != errno.EINVAL or capability == 0:
                raise
            return  # after the last capability of this kernel
        capability += 1


def drop_capabilities() -> None:
    """Drop all capabilities of this process."""
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, bytes(24)), "capset")
