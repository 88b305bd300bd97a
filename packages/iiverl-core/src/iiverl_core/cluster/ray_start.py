"""Ray's start, which takes seconds, beside other work of this process."""

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future

import ray

from iiverl_core.cluster.ray_connection import start_ray, stop_ray
from iiverl_core.config import RunConfig
from iiverl_core.stopping import undisturbed


class RayStart:
    """Ray for one run, started or connected to by a thread, until it is closed.

    The thread stays until then: the kernel ends Ray's processes together with the thread that started them.
    """

    def __init__(self, run: RunConfig) -> None:
        """Begin to start Ray on this machine with a CPU for each process, or to connect to the cluster that there is."""
        processes = run.devices + (run.trainer.rollout_devices or 0)
        self._result: Future[None] = Future()
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._serve,
            args=(
                run.ray.num_cpus or max(os.cpu_count() or 1, processes),
                run.trainer.nnodes,
                run.ray.runtime_env.env_vars,
            ),
            name="iiverl-ray",
            daemon=True,
        )
        self._thread.start()

    def wait(self) -> None:
        """Return once Ray runs. Raises what `start_ray` raised."""
        self._result.result()

    def close(self) -> None:
        """End Ray, or disconnect from the cluster. May be called twice."""
        with undisturbed():
            if self._result.exception() is None and not self._over.is_set():
                stop_ray()
            self._over.set()
            self._thread.join()

    def _serve(self, cpus: int, nodes: int, variables: Mapping[str, str]) -> None:
        try:
            start_ray(cpus, nodes, variables)
        except BaseException as error:
            self._result.set_exception(error)
        else:
            self._result.set_result(None)
            self._over.wait()


def start_in_background(run: RunConfig) -> RayStart | None:
    """Begin to start Ray for a run; None if the run does not use Ray, or this process does already."""
    return RayStart(run) if run.trainer.runtime == "ray" and not ray.is_initialized() else None
