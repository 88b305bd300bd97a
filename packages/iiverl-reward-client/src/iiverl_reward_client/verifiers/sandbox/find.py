"""Find a sandbox on this machine, and test it before it is used."""

import os
import shutil

from iiverl_reward_client.verifiers.sandbox.base import Sandbox, SandboxError, SandboxUnavailable
from iiverl_reward_client.verifiers.sandbox.fusion import FusionSandbox
from iiverl_reward_client.verifiers.sandbox.namespace_sandbox import NamespaceSandbox
from iiverl_reward_client.verifiers.sandbox.self_test import PROBE_LIMITS, leaks

_ADVICE = (
    "Namespaces need Linux 5.14 or newer that allows this user to create them: sysctl user.max_user_namespaces above 0 and, "
    "where they exist, kernel.unprivileged_userns_clone=1 and kernel.apparmor_restrict_unprivileged_userns=0; in a "
    "container, --security-opt with seccomp=unconfined, apparmor=unconfined and systempaths=unconfined. Else install "
    "bubblewrap (not for root), or start a Sandbox Fusion server and set FUSION_SANDBOX_URL to its address."
)


def find_sandbox(fusion_url: str | None) -> Sandbox:
    """Return Sandbox Fusion if its URL is given, else namespaces, else bubblewrap.

    It is tested once with a program that tries what it must not reach (Sandbox Fusion: with any program).

    Raises:
        SandboxUnavailable: there is none; says why and what to do.
    """
    if fusion_url:
        remote = FusionSandbox(fusion_url)
        _check_runs(remote, fusion_url)
        return remote
    reasons = []
    for name, bubblewrap in _candidates():
        try:
            sandbox = NamespaceSandbox(bubblewrap)
            reached = leaks(sandbox)
        except SandboxError as error:
            reasons.append(f"{name}: {error}")
            continue
        if not reached:
            return sandbox
        reasons.append(f"{name}: it leaks, programs reach {', '.join(reached)}")
    raise SandboxUnavailable(f"there is no sandbox for code on this machine. {'. '.join(reasons)}. {_ADVICE}")


def _candidates() -> list[tuple[str, str | None]]:
    """Return namespaces, and bubblewrap, which has more rights than other programs on some systems.

    As root there is no bubblewrap, since its namespaces have no other user.
    """
    candidates: list[tuple[str, str | None]] = [("Namespaces", None)]
    bubblewrap = shutil.which("bwrap")
    if bubblewrap and os.geteuid() != 0:
        candidates.append(("Bubblewrap", bubblewrap))
    return candidates


def _check_runs(sandbox: Sandbox, url: str) -> None:
    try:
        execution = sandbox.run("print(input() + ' there')", "anybody", limits=PROBE_LIMITS)
    except SandboxError as error:
        raise SandboxUnavailable(
            f"Sandbox Fusion at {url} cannot be used: {error}. Check its URL."
        ) from error
    if execution.stdout.strip() != "anybody there":
        raise SandboxUnavailable(f"Sandbox Fusion at {url} does not run Python: {execution}")
