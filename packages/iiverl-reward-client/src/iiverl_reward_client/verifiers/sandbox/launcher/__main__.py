"""Entry of the launcher: `python -I -S launcher/__main__.py SPEC CONTROL HOW`, two file descriptors and a method."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType, ModuleType


def _name_packages() -> None:
    """Make this package's modules importable by name without importing its parent packages.

    These import httpx and more, which takes longer than most programs here.
    """
    folder = Path(__file__).resolve().parent
    name = "iiverl_reward_client.verifiers.sandbox.launcher"
    while name:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        folder, name = folder.parent, name.rpartition(".")[0]


def main(spec_file: int, control: int, how: str) -> int:
    """Create the sandbox, start process 1 in it, and wait until it and everything else in it is gone.

    `how` is `namespaces`, the path of bubblewrap, or `inside`: this is process 1 in bubblewrap's sandbox.
    SIGTERM kills the sandbox; so does the end of the caller.
    """
    from iiverl_reward_client.verifiers.sandbox.launcher import bubblewrap, kernel, namespaces, supervisor
    from iiverl_reward_client.verifiers.sandbox.launcher.spec import Spec, send

    os.umask(0o022)  # the program, which is another user, can read what is made for it
    for descriptor in (spec_file, control):
        os.set_inheritable(descriptor, False)
    try:
        spec = Spec.from_json(os.pread(spec_file, os.fstat(spec_file).st_size, 0))
        if how == "inside":
            supervisor.supervise(spec, control, built=True)
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first to be killed if memory runs out
        if how == "namespaces":
            namespaces.enter()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until there is a child to pass it on to
        kernel.die_with_parent(signal.SIGTERM, spec.parent)
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)  # process 1 is bubblewrap's child before it is ours
        child = os.fork()
        if child == 0:
            if how == "namespaces":
                supervisor.supervise(spec, control)
            os.execv(how, bubblewrap.command(how, spec, spec_file=spec_file, control=control))
    except OSError as error:
        send(control, error=str(error))
        return 1
    os.close(control)
    _wait_for_all(child)
    return 0


def _wait_for_all(child: int) -> None:
    """Wait until the child and its orphans are gone; pass SIGTERM on as SIGKILL."""

    def kill(number: int, frame: FrameType | None) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # its pid may be reused once it is reaped
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    _name_packages()
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
