"""A sandbox is proven before it is trusted, and where there is none it is said why."""

import subprocess
import sys

import pytest

from iiverl_reward_client.verifiers.sandbox import (
    DEFAULT_LIMITS,
    Execution,
    Limits,
    Sandbox,
    SandboxUnavailable,
    find_sandbox,
)
from iiverl_reward_client.verifiers.sandbox.self_test import leaks


class NoSandbox:
    """Runs the program beside this one, as a sandbox must not."""

    def __init__(self, bubblewrap: str | None = None) -> None:
        pass

    def run(
        self, source: str, stdin: str = "", *, language: str = "python", limits: Limits = DEFAULT_LIMITS
    ) -> Execution:
        done = subprocess.run(
            [sys.executable, "-c", source], input=stdin, capture_output=True, text=True, check=False
        )
        return Execution(done.stdout, done.stderr, done.returncode, "exit")


def test_the_self_test_finds_nothing_within_reach(sandbox: Sandbox) -> None:
    assert leaks(sandbox) == []


def test_the_self_test_sees_a_sandbox_that_leaks(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(str(tmp_path))
    found = leaks(NoSandbox())
    assert {"the loopback network", "the server's files", "the server's process", "new privileges"} <= set(
        found
    )


def test_a_sandbox_that_leaks_is_not_given(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setattr("iiverl_reward_client.verifiers.sandbox.find.NamespaceSandbox", NoSandbox)
    with pytest.raises(
        SandboxUnavailable, match=r"it leaks, programs reach the loopback network, the server's files"
    ):
        find_sandbox(None)


def test_a_machine_without_user_namespaces_is_told_what_to_do(sandbox: Sandbox) -> None:
    program = (
        "from iiverl_reward_client.verifiers.sandbox import SandboxUnavailable, find_sandbox\n"
        "open('/proc/sys/user/max_user_namespaces', 'w').write('0')\n"
        "try: find_sandbox(None)\n"
        "except SandboxUnavailable as error: print(error.reason)\n"
    )
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "No space left on device" in done.stdout, done.stderr
    assert "user.max_user_namespaces" in done.stdout and "FUSION_SANDBOX_URL" in done.stdout


def test_another_system_is_told_that_it_has_no_namespaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxUnavailable, match=r"namespaces need Linux.*FUSION_SANDBOX_URL"):
        find_sandbox(None)
