"""How vLLM is switched on, and what of its behaviour changes with its version; the range is `config.vllm`'s."""

import logging
import os
import warnings
from types import ModuleType

from iiverl_core.config.vllm import installed_version, version_problem
from iiverl_core.errors import ConfigError

LOWEST_TEMPERATURE = 0.01  # vLLM samples at this temperature where asked for a lower one

ENVIRONMENT = {
    # The engine lives in the worker's process: no second copy of it is spawned, and weights are handed over as they are.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the process trains too: its threads stay where they are
    # Under Ray a process sees its own device alone: sums over devices that read each other's memory cannot be set up, or
    # hang where that is tried. NCCL does them.
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def import_vllm() -> ModuleType:
    """Check the version, set what vLLM reads from the environment where the user did not, and import it.

    Raises:
        ConfigError: vLLM is missing, not supported, or cannot be imported.
    """
    if problem := version_problem(installed_version()):
        raise ConfigError(problem)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)  # of vLLM's own use of torch
            import vllm
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"vLLM is installed and cannot be imported: {error}. Was it built for another torch or another device?"
        ) from error
    # vLLM sets its level when an engine is made, and has something to say before that.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"].upper())
    return vllm
