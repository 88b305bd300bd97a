"""Which sandbox there is here, proven before it is trusted."""

import os
import shutil

from iiverl_reward_client.verifiers.sandbox.fusion import FusionSandbox
from iiverl_reward_client.verifiers.sandbox.own import NamespaceSandbox
from iiverl_reward_client.verifiers.sandbox.probe import PROBE_LIMITS, leaks
from iiverl_reward_client.verifiers.sandbox.seam import Sandbox, SandboxError, SandboxUnavailable

_ADVICE = (
    "Namespaces need Linux 5.14 or newer that lets this user make them: sysctl user.max_user_namespaces above 0 and, "
    "where they exist, kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0; in a "
    "container, --security-opt with seccomp=unconfined, apparmor=unconfined and systempaths=unconfined. Else install "
    "bubblewrap (not for root), or start a Sandbox Fusion server and set FUSION_SANDBOX_URL to its address."
)


def find_sandbox(fusion_url: str | None) -> Sandbox:
    """Give the sandbox to use: Sandbox Fusion where its URL is given, else namespaces, else bubblewrap.

    It is proven once with a program that tries what it must not reach (Sandbox Fusion: that it runs one at all).

    Raises:
        SandboxUnavailable: there is none; says why and what to do.
    """
    if fusion_url:
        remote = FusionSandbox(fusion_url)
        _prove_it_runs(remote, fusion_url)
        return remote
    reasons = []
    for way, bubblewrap in _ways():
        try:
            sandbox = NamespaceSandbox(bubblewrap)
            reached = leaks(sandbox)
        except SandboxError as error:
            reasons.append(f"{way}: {error}")
            continue
        if not reached:
            return sandbox
        reasons.append(f"{way}: it leaks, programs reach {', '.join(reached)}")
    raise SandboxUnavailable(f"no sandbox for code can be had here. {'. '.join(reasons)}. {_ADVICE}")


def _ways() -> list[tuple[str, str | None]]:
    """Namespaces of our own, then bubblewrap, which some systems allow what they allow nobody else.

    Not for root: in bubblewrap's namespaces it has no other user to be.
    """
    ways: list[tuple[str, str | None]] = [("Own namespaces", None)]
    bubblewrap = shutil.which("bwrap")
    if bubblewrap and os.geteuid() != 0:
        ways.append(("Bubblewrap", bubblewrap))
    return ways


def _prove_it_runs(sandbox: Sandbox, url: str) -> None:
    try:
        execution = sandbox.run("print(input() + ' there')", "anybody", limits=PROBE_LIMITS)
    except SandboxError as error:
        raise SandboxUnavailable(f"Sandbox Fusion at {url} is of no use: {error}. Check its URL.") from error
    if execution.stdout.strip() != "anybody there":
        raise SandboxUnavailable(f"Sandbox Fusion at {url} does not run Python: {execution}")
