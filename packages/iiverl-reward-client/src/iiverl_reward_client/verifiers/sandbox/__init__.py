"""Where programs that a model wrote are run: a sandbox of our own on Linux, or a Sandbox Fusion server."""

from iiverl_reward_client.verifiers.sandbox.find import find_sandbox
from iiverl_reward_client.verifiers.sandbox.seam import (
    DEFAULT_LIMITS,
    Ending,
    Execution,
    Limits,
    Sandbox,
    SandboxError,
    SandboxUnavailable,
    UnsupportedLanguage,
)

__all__ = [
    "DEFAULT_LIMITS",
    "Ending",
    "Execution",
    "Limits",
    "Sandbox",
    "SandboxError",
    "SandboxUnavailable",
    "UnsupportedLanguage",
    "find_sandbox",
]
