"""Settings of a worker's process, made before its first work on a device."""

import os

import torch

from iiverl_core.config import RunConfig

DETERMINISTIC = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "FLASH_ATTENTION_DETERMINISTIC": "1",
    "NCCL_ALGO": "Ring",
    "VLLM_BATCH_INVARIANT": "1",
}
"""Environment variables under which libraries sum in one order."""


def configure_allocator() -> None:
    """Let CUDA memory grow in segments that can be extended, unless the user has configured the allocator.

    Micro-batches differ in size; without it, blocks that were freed remain reserved and fit nothing else. It counts from
    the process's first allocation on. This is the older name of the variable, the only one that some libraries read.
    """
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def make_deterministic(device_type: str, *, asked: bool) -> None:
    """Let libraries compute in the same order each time, as far as they can; what they cannot on a GPU, torch warns of.

    GPUs compute like that only if the run asks for it, CPUs always. There it costs little: torch adds up in one order anyway,
    but for `index_put_` on several threads, such as the gradient of an indexed tensor. vLLM's build for CPUs has nothing for
    its variable. Variables that the user has set stay as they are.
    """
    if not asked and device_type != "cpu":
        return
    if device_type != "cpu":
        for name, value in DETERMINISTIC.items():
            os.environ.setdefault(name, value)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Nothing here reads memory before it is written. Torch's types do not have this property of the module.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def use_idle_cores(run: RunConfig) -> None:
    """Give a process with a GPU its part of the machine's cores, if it steps an optimizer in CPU memory.

    Ray gives each process one thread.
    """
    if any(role.offload.parameters or role.offload.optimizer for role in run.roles.values()):
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // run.trainer.n_gpus_per_node))
