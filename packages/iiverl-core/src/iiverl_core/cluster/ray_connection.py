"""Connecting to a Ray cluster, or starting Ray on this machine, with one clear error when that fails."""

import logging
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from uuid import uuid4

import ray
from ray._common.utils import get_default_system_temp_dir, get_ray_address_file
from ray.exceptions import AuthenticationError

from iiverl_core.errors import ConfigError, IIVerlError
from iiverl_core.orphans import Lifeline
from iiverl_core.telemetry.terminal import takes_escape_codes

CONNECT_TIMEOUT_S = 5
"""How long the head of a cluster may take to answer before it counts as unreachable; Ray itself tries for two minutes."""

POLL_S = 0.5  # between looks at the machines of a cluster that is still starting

_MARK = "IIVERL_RAY_OF"
_lifelines: list[Lifeline] = []  # of the Ray that this process started, if it did

MAX_SOCKET_BYTES = 107
_A_SESSION = "session_2026-01-31_12-00-00_123456_1234567"  # the time and the process that starts Ray
_LOG_BYTES = 16 * 2**20  # enough for Ray's first logs; it asks for more itself

FORWARDED = (
    "CUBLAS_",
    "FLASH_ATTENTION_",
    "GLOO_",
    "HF_",
    "HUGGING",
    "NCCL_",
    "NVTE_",
    "PYTORCH_",
    "TORCH_",
    "TRANSFORMERS_",
    "UCX_",
    "VLLM_",
)
"""Prefixes of the variables that go from this command to the workers of a cluster."""

NO_VARIABLES: Mapping[str, str] = MappingProxyType({})

_START = "ray start --head on the first machine, ray start --address=FIRST:6379 on each other one"
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_SETTINGS = (
    4  # the type of the frame that a gRPC server, such as the head of a Ray cluster, sends first
)


def start_ray(
    cpus: int, nodes: int = 1, variables: Mapping[str, str] = NO_VARIABLES, *, timeout_s: float = 0
) -> None:
    """Connect to the cluster that `RAY_ADDRESS` names, else start Ray on this machine with this many CPUs.

    Workers have the environment `variables` in addition to those of this process. A cluster with fewer machines than
    `nodes` is waited for up to `timeout_s` seconds.

    Raises:
        IIVerlError: Ray does not start on this machine.
        ConfigError: the run needs several `nodes` and the cluster has fewer, or there is no cluster; or the cluster
            does not answer, or does not let this process in; or Ray cannot use the temporary folder.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address and nodes > 1:
        raise ConfigError(
            f"trainer.nnodes: {nodes} asks for {nodes} machines, and RAY_ADDRESS names no Ray cluster. Start one "
            f"({_START}) and set RAY_ADDRESS=FIRST:6379 for this command; or set trainer.nnodes: 1"
        )
    if address:
        _check_cluster(address)
    forwarded = {**(worker_environment(os.environ) if address else {}), **variables}
    if not takes_escape_codes(sys.stderr):
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # of the lines that workers print
    handler = signal.getsignal(signal.SIGTERM)
    if not address:
        _check_temporary_folder(Path(get_default_system_temp_dir()))
        _end_ray_with_this_process()
    try:
        ray.init(
            # "local", because Ray without an address connects to any cluster that this machine is a part of.
            address=address or "local",
            num_cpus=None if address else cpus,
            include_dashboard=None if address else False,
            runtime_env={"env_vars": forwarded} if forwarded else None,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises plain ones when a process of its own does not come up
        _close_lifeline()
        if address:
            raise ConfigError(f"RAY_ADDRESS={address}: {error}") from error
        raise IIVerlError(
            f"Ray did not start on this machine: {error}\nA very busy machine and a full disk are the usual causes. Try "
            "again, or run in one process without Ray: trainer.runtime=local trainer.n_gpus_per_node=1"
        ) from error
    finally:
        os.environ.pop(_MARK, None)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own ends the process without cleaning up
    deadline = time.monotonic() + timeout_s
    while (machines := sum(node["Alive"] for node in ray.nodes())) < nodes and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if machines < nodes:
        stop_ray()
        raise ConfigError(
            f"trainer.nnodes: {nodes} asks for {nodes} machines, and the Ray cluster at {address} has {machines}. Add "
            "machines (ray start --address=FIRST:6379 on each), ask for fewer, or set trainer.placement_timeout if they are "
            "still starting"
        )


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Select the variables that the workers of a cluster need as well, whose machines have environments of their own.

    `FORWARDED` has the first parts of their names; Ray's own and what is different on each machine are not among them.
    """
    return {name: value for name, value in environment.items() if name.startswith(FORWARDED)}


def stop_ray() -> None:
    """Disconnect, and end Ray if `start_ray` started it."""
    ray.shutdown()
    _close_lifeline()


def _close_lifeline() -> None:
    if _lifelines:
        _lifelines.pop().close()


def _end_ray_with_this_process() -> None:
    """Let the Ray that is started next end if this process dies; its agents would stay for ever."""
    os.environ[_MARK] = uuid4().hex  # which all processes of Ray inherit
    lifeline = Lifeline()
    lifeline.end_marked(f"{_MARK}={os.environ[_MARK]}")
    _lifelines.append(lifeline)


def _check_cluster(named: str) -> None:
    """Check within seconds that the head of a cluster answers, and lets this process in."""
    scheme, _, rest = named.rpartition("://")
    if scheme not in ("", "ray"):  # of a plugin
        return
    address = rest if scheme else _resolved(named)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"RAY_ADDRESS={named}: expected HOST:PORT, as in 10.0.0.1:6379, or auto")
    if reason := _no_answer(host.strip("[]"), int(port)):
        at = f" ({address}, from {get_ray_address_file(None)})" if named == "auto" else ""
        raise ConfigError(
            f"RAY_ADDRESS={named}{at}: no Ray cluster answers there ({reason}). Start one ({_START}), correct "
            "RAY_ADDRESS, or unset it to start Ray on this machine for the run"
        )
    if scheme:
        return
    try:
        from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]

        GcsClient(address=address)  # as Ray's own commands do: ray.init hides why it was refused
    except AuthenticationError as error:
        raise ConfigError(
            f"RAY_ADDRESS={named}: the cluster asks for a token, and this command's is missing or wrong. Set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the token of the cluster: on its first machine, "
            "`ray get-auth-token` prints it. Or start the cluster with RAY_AUTH_MODE=disabled"
        ) from error
    except ImportError:  # a version of Ray that has no such client; ray.init decides
        pass


def _check_temporary_folder(folder: Path) -> None:
    """Check that Ray can write to a folder, and that the names of its sockets there are not too long."""
    advice = "Set RAY_TMPDIR to another folder, such as /tmp, for this command"
    socket_file = folder / "ray" / _A_SESSION / "sockets" / "plasma_store"
    if len(os.fsencode(socket_file)) > MAX_SOCKET_BYTES:
        raise ConfigError(
            f"the temporary folder {folder} has too long a name for Ray: its sockets there have "
            f"{len(os.fsencode(socket_file))} bytes, and Unix allows {MAX_SOCKET_BYTES}. {advice}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)  # as Ray does
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_LOG_BYTES))
    except OSError as error:
        raise ConfigError(
            f"Ray cannot write to the temporary folder {folder}: {error.strerror}. {advice}"
        ) from error


def _resolved(named: str) -> str:
    if named != "auto":
        return named
    from ray._private.services import get_ray_address_from_environment

    try:
        return get_ray_address_from_environment(named, None)
    except ConnectionError as error:
        raise ConfigError(
            f"RAY_ADDRESS=auto: this machine is part of no Ray cluster. Start one ({_START}), or unset RAY_ADDRESS "
            "to start Ray on this machine for the run"
        ) from error


def _no_answer(host: str, port: int) -> str | None:
    """Return why no gRPC server answers at an address; None if one does."""
    try:
        with socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") not in ("0", "", "false", "False"):
                return None
            connection.sendall(_HTTP2_HELLO)
            frame = connection.recv(9)
    except TimeoutError:
        return f"nothing came back within {CONNECT_TIMEOUT_S} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None if len(frame) == 9 and frame[3] == _HTTP2_SETTINGS else "something else listens there"
