"""Enter new namespaces of every kind, and map the sandbox's users."""

import os
from pathlib import Path

from iiverl_reward_client.verifiers.sandbox.launcher import kernel
from iiverl_reward_client.verifiers.sandbox.launcher.filesystem import UID


def enter() -> None:
    """Leave the machine's namespaces: user, mount, network, UTS, IPC, cgroup and, for children, pid.

    As root, uid 0 inside is root outside (it only builds the file system), and `UID` is nobody. As any other user,
    `UID` is that user, and there is no other.

    Raises:
        OSError: the kernel or its settings do not allow it.
    """
    if os.geteuid() == 0:
        _enter_as_root()
    else:
        uid, gid = os.geteuid(), os.getegid()
        kernel.unshare(kernel.ALL_NAMESPACES)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{UID} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{UID} {gid} 1")
    kernel.set_host_name("sandbox")


def _enter_as_root() -> None:
    """Map two users, which only a process that is still root outside may do: a child that stays there."""
    inner, go = os.pipe()
    me = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(go)  # so that it also reads the end if the other process dies
        os._exit(_write_maps_of(me) if os.read(inner, 1) else 1)
    kernel.unshare(kernel.ALL_NAMESPACES)
    os.write(go, b"x")
    _, status = os.waitpid(helper, 0)
    os.close(inner)
    os.close(go)
    if number := os.waitstatus_to_exitcode(status):
        raise OSError(number, f"map the users of a new namespace: {os.strerror(number)}")
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _write_maps_of(pid: int) -> int:
    """Return 0 or an errno."""
    try:
        for name in ("gid_map", "uid_map"):
            Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{UID} {UID} 1\n")
    except OSError as error:
        return error.errno or 1
    return 0
