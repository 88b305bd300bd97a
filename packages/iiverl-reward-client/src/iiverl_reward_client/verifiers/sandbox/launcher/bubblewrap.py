"""The sandbox's namespaces and file system as a command of bubblewrap (`bwrap`, 0.8 or newer)."""

import os
from pathlib import Path

from iiverl_reward_client.verifiers.sandbox.launcher import filesystem
from iiverl_reward_client.verifiers.sandbox.launcher.spec import Spec

_LAUNCHER = "/launcher"


def command(bwrap: str, spec: Spec, *, spec_file: int, control: int) -> list[str]:
    """Build the command that creates the sandbox and runs the launcher in it as process 1.

    Unlike the root of `filesystem`, `/proc` shows the machine's figures, and `/dev` is bubblewrap's. The two files, and
    one with the program, are inherited by it.
    """
    for descriptor in (spec_file, control):
        os.set_inheritable(descriptor, True)
    program = _file_of(spec.source.encode("utf-8", "surrogatepass"))
    uid = str(filesystem.UID)
    words = [bwrap, "--unshare-all", "--unshare-user", "--as-pid-1", "--die-with-parent", "--clearenv"]
    words += ["--uid", uid, "--gid", uid, "--hostname", "sandbox"]
    for path in filesystem.SYSTEM:
        if Path(path).is_symlink():
            words += ["--symlink", os.readlink(path), path]  # noqa: PTH115
        else:
            words += ["--ro-bind-try", path, path]
    if not Path(spec.prefix).is_relative_to("/usr"):
        words += ["--ro-bind", spec.prefix, spec.prefix]
    words += ["--ro-bind", str(Path(__file__).resolve().parent), _LAUNCHER]
    words += ["--dev", "/dev", "--proc", "/proc"]
    words += ["--perms", "0444", "--ro-bind-data", str(program), filesystem.PROGRAM]
    words += ["--perms", "0700", "--size", str(spec.file_bytes), "--tmpfs", filesystem.SCRATCH]
    words += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", filesystem.SCRATCH]
    words += ["--", spec.interpreter, "-I", "-S", f"{_LAUNCHER}/__main__.py"]
    return [*words, str(spec_file), str(control), "inside"]


def _file_of(content: bytes) -> int:
    descriptor = os.memfd_create("program", 0)
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
