"""The actor of Ray in which a worker lives.

This module imports nothing heavy: what the worker needs is imported by its constructor.
"""

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

from iiverl_core import activity
from iiverl_core.cluster.heartbeats import HeartbeatAddress, send_heartbeats
from iiverl_core.garbage import importing


class WorkerActor:
    """The actor around a worker: builds it, and calls its methods by name.

    `worker` is a pickled class. It is imported with the actor, so that little time passes between `init_method` and `build`.
    `folder` is where the run was started: the process goes there, since paths in a configuration are relative to it. On
    a cluster it is a shared one.
    """

    def __init__(self, worker: bytes, folder: str, heartbeats: HeartbeatAddress | None = None) -> None:
        if Path(folder).is_dir():
            os.chdir(folder)
        if devices := ray.get_gpu_ids():  # Ray does so itself, unless the cluster is set up not to
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
        with importing():
            self._class, self._worker = pickle.loads(worker), None
        self._store: Any = None
        if heartbeats is not None:
            send_heartbeats(heartbeats)

    def ping(self) -> None:
        """Return."""

    def init_method(self) -> str:
        """Return an `init_method` on this machine."""
        from iiverl_core.cluster.rendezvous import open_init_method  # imports torch

        init_method, self._store = open_init_method(ray.util.get_node_ip_address())
        return init_method

    def build(self, arguments: tuple[Any, ...]) -> Any:
        """Build the worker, and return its `info`."""
        with activity.call("start"):
            worker = self._worker = self._class(*arguments)
            self._store = None  # the group has it
            return worker.info

    def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method."""
        with activity.call(method):
            return getattr(self._worker, method)(*arguments)

    def stream(self, method: str, arguments: tuple[Any, ...]) -> Iterator[Any]:
        """Call a generator of pairs, and yield their parts in turn; `RayPool.stream` pairs them again.

        So a pair's first part is an object of its own in Ray's store, which outlives this process. Ray loses objects
        that are only named within what a generator yields.
        """
        with activity.call(method):
            for stored, passed_on in getattr(self._worker, method)(*arguments):
                yield stored
                yield passed_on
