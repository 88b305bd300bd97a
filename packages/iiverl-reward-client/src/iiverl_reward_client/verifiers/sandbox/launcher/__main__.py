"""Entry of the launcher: `python -I -S launcher/__main__.py SPEC CONTROL HOW`, two numbers of open files and a way."""

import os
import signal
import sys
from pathlib import Path
from types import FrameType, ModuleType


def _name_packages() -> None:
    """Make this package's modules importable by their names without running the packages around it.

    They import httpx and more, which takes longer than most programs that run here.
    """
    folder = Path(__file__).resolve().parent
    name = "iiverl_reward_client.verifiers.sandbox.launcher"
    while name:
        package = ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
        folder, name = folder.parent, name.rpartition(".")[0]


def main(spec_file: int, control: int, how: str) -> int:
    """Make the sandbox, start process 1 in it and wait until it, and with it everything, is gone.

    `how` is `own` (namespaces), the path of bubblewrap, or `inside`: this is process 1 in what bubblewrap made.
    SIGTERM kills the sandbox; so does the end of the caller.
    """
    from iiverl_reward_client.verifiers.sandbox.launcher import bubblewrap, kernel, namespaces, supervisor
    from iiverl_reward_client.verifiers.sandbox.launcher.spec import Spec, tell

    for descriptor in (spec_file, control):
        os.set_inheritable(descriptor, False)
    try:
        spec = Spec.from_json(os.pread(spec_file, os.fstat(spec_file).st_size, 0))
        if how == "inside":
            supervisor.supervise(spec, control, built=True)
        Path("/proc/self/oom_score_adj").write_text("1000")  # the first to go when the machine is short
        if how == "own":
            namespaces.enter()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until there is somebody to pass it on to
        kernel.die_with_parent(signal.SIGTERM, spec.parent)
        kernel.prctl(kernel.PR_SET_CHILD_SUBREAPER, 1)  # process 1 is bubblewrap's child before it is ours
        child = os.fork()
        if child == 0:
            if how == "own":
                supervisor.supervise(spec, control)
            os.execv(how, bubblewrap.command(how, spec, spec_file=spec_file, control=control))
    except OSError as error:
        tell(control, error=str(error))
        return 1
    os.close(control)
    _wait_for_all(child)
    return 0


def _wait_for_all(child: int) -> None:
    """Wait until neither the child nor what it leaves behind is there; pass SIGTERM on as SIGKILL."""

    def kill(number: int, frame: FrameType | None) -> None:
        os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGTERM, kill)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # its pid may be another's once it is reaped
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    _name_packages()
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))
