"""The sandbox's file system: a read-only root with the system's programs and libraries, and a scratch folder."""

import os
from pathlib import Path

from iiverl_reward_client.verifiers.sandbox.launcher import kernel

UID = 65534  # nobody, with the same number in the sandbox and, if root starts it, outside
SCRATCH = "/scratch"
PROGRAM = "/program/main.py"

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
_OLD = "/old-root"
_RESTRICTED = kernel.MS_NOSUID | kernel.MS_NODEV
_SCRATCH_FILES = 16384
_SPARE_BYTES = 1 << 20  # of the root in addition to the program: folders and links


def enter(source: bytes, prefix: str, scratch_bytes: int) -> None:
    """Make the new root the only file system of this process; requires new mount and pid namespaces.

    `prefix` is the interpreter's folder, mounted at the same path. `source` becomes the file `PROGRAM`.
    """
    kernel.mount("none", "/", flags=kernel.MS_REC | kernel.MS_PRIVATE)
    size = len(source) + _SPARE_BYTES
    kernel.mount("tmpfs", "/tmp", "tmpfs", _RESTRICTED, f"mode=0755,size={size}")
    Path("/tmp" + _OLD).mkdir()
    kernel.pivot_root("/tmp", "/tmp" + _OLD)
    os.chdir("/")
    for path in SYSTEM:
        _mount_read_only(path)
    if not Path(prefix).is_relative_to("/usr"):
        _mount_read_only(prefix)
    _make_dev()
    _make_proc()
    _write("/etc/passwd", f"nobody:x:{UID}:{UID}:nobody:{SCRATCH}:/bin/false\n".encode())
    _write(PROGRAM, source)
    _make_scratch(scratch_bytes)
    kernel.detach(_OLD)
    Path(_OLD).rmdir()
    kernel.restrict_mount("/", kernel.MS_RDONLY | _RESTRICTED, recursive=False)
    os.chdir(SCRATCH)


def _mount_read_only(path: str) -> None:
    """Mount a file or folder of the old root read-only at the same path; a link stays a link."""
    old = Path(_OLD + path)
    if old.is_symlink():
        Path(path).symlink_to(old.readlink())
    elif old.exists():
        _bind(old, path)
        kernel.restrict_mount(path, kernel.MS_RDONLY | _RESTRICTED, recursive=True)


def _bind(old: Path, path: str) -> None:
    target = Path(path)
    if old.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    kernel.mount(str(old), path, flags=kernel.MS_BIND | kernel.MS_REC)


def _make_dev() -> None:
    for device in _DEVICES:
        _bind(Path(_OLD + device), device)
        kernel.restrict_mount(device, kernel.MS_NOSUID | kernel.MS_NOEXEC, recursive=False)
    for name, target in {
        "fd": "/proc/self/fd",
        "stdin": "/proc/self/fd/0",
        "stdout": "/proc/self/fd/1",
        "stderr": "/proc/self/fd/2",
        "shm": SCRATCH,  # semaphores and shared memory count as scratch files
    }.items():
        Path("/dev", name).symlink_to(target)


def _make_proc() -> None:
    """Mount /proc with processes only, of which a program sees its own."""
    Path("/proc").mkdir()
    flags = kernel.MS_RDONLY | _RESTRICTED | kernel.MS_NOEXEC
    kernel.mount("proc", "/proc", "proc", flags, "subset=pid,hidepid=invisible")


def _make_scratch(size: int) -> None:
    Path(SCRATCH).mkdir()
    options = f"mode=0700,uid={UID},gid={UID},size={size},nr_inodes={_SCRATCH_FILES}"
    kernel.mount("tmpfs", SCRATCH, "tmpfs", _RESTRICTED | kernel.MS_NOEXEC, options)
    if not os.path.lexists("/tmp"):  # it exists if the interpreter is in it
        Path("/tmp").symlink_to(SCRATCH)


def _write(path: str, content: bytes) -> None:
    file = Path(path)
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    file.chmod(0o444)
