"""Sandboxes for programs that a model wrote: Linux namespaces, or a Sandbox Fusion server."""

from iiverl_reward_client.verifiers.sandbox.base import (
    DEFAULT_LIMITS,
    Ending,
    Execution,
    Limits,
    Sandbox,
    SandboxError,
    SandboxUnavailable,
    UnsupportedLanguage,
)
from iiverl_reward_client.verifiers.sandbox.find import find_sandbox

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
