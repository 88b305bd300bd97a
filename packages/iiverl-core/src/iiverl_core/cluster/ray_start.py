"""Ray for a run: its start, which takes seconds in which this process imports what it needs next, and its end."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import ray

from iiverl_core.cluster.ray_connection import start_ray, stop_ray
from iiverl_core.config import RunConfig
from iiverl_core.stopping import undisturbed


@contextmanager
def ray_for(run: RunConfig) -> Iterator[None]:
    """Start Ray with a CPU for each process, or connect to the cluster that there is, until the block ends.

    Does nothing if the run does not use Ray, or this process does already. Raises what `start_ray` raises.
    """
    if run.trainer.runtime != "ray" or ray.is_initialized():
        yield
        return
    processes = run.devices + (run.trainer.rollout_devices or 0)
    cpus = run.ray.num_cpus or max(os.cpu_count() or 1, processes)
    # Ray is started by the main thread: it has the signals, and the kernel ends Ray's processes with their starter.
    imports = threading.Thread(target=_import_ahead, name="iiverl-imports", daemon=True)
    imports.start()
    try:
        timeout_s = run.trainer.placement_timeout or 0
        start_ray(cpus, run.trainer.nnodes, run.ray.runtime_env.env_vars, timeout_s=timeout_s)
    finally:
        imports.join()
    try:
        yield
    finally:
        with undisturbed():  # by a further Ctrl-C
            stop_ray()


def _import_ahead() -> None:
    """Import what reading prompts and starting workers need; whoever needs it sees what is wrong with it."""
    with suppress(Exception):
        from transformers import AutoTokenizer  # noqa: F401

        import iiverl_core.cluster.ray_group  # noqa: F401
