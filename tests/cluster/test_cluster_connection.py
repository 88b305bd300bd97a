"""What can be wrong with a Ray cluster before a run is on it: each is one message that says what to do."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from iiverl_core.cluster import ray_connection
from iiverl_core.cluster.ray_connection import start_ray
from iiverl_core.errors import ConfigError, IIVerlError


def refuse(connection: socket.socket) -> None:
    """Close at once."""


def wait(connection: socket.socket) -> None:
    """Say nothing."""
    connection.recv(1000)
    connection.recv(1)


def http(connection: socket.socket) -> None:
    """Answer as a web server does."""
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """Give the address of a server."""

    def accept() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                serve(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def message(monkeypatch: pytest.MonkeyPatch, address: str | None, nodes: int = 1) -> str:
    """The one message of a start that must fail, within seconds."""
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        start_ray(cpus=1, nodes=nodes)
    assert time.monotonic() - began < 10
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("address", [None, ""])
def test_several_machines_need_a_cluster(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    told = message(monkeypatch, address, nodes=2)
    assert "trainer.nnodes: 2 asks for 2 machines, and RAY_ADDRESS names no Ray cluster" in told
    assert all(part in told for part in ("ray start --head", "ray start --address=", "set RAY_ADDRESS="))


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    address = free_address()
    told = message(monkeypatch, address, nodes=2)
    assert f"RAY_ADDRESS={address}: no Ray cluster answers there (connection refused)" in told
    assert "ray start --head" in told and "unset it" in told


def test_the_file_of_a_cluster_that_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    address = free_address()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)  # of other clusters on this machine
    told = message(monkeypatch, "auto")
    assert f"RAY_ADDRESS=auto ({address}, from {tmp_path}/ray/ray_current_cluster): no Ray cluster" in told


def test_a_ray_client_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no Ray cluster answers there (connection refused)" in message(
        monkeypatch, f"ray://{free_address()}"
    )


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_whose_sockets_have_too_long_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / ("x" * 100)))
    told = message(monkeypatch, None)
    assert str(tmp_path / "xxx") in told and "Unix allows 107" in told and "Set RAY_TMPDIR" in told


def test_a_temporary_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc")
    told = message(monkeypatch, None)
    assert "Ray cannot write to the temporary folder /proc: " in told and "Set RAY_TMPDIR" in told


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(ray_connection.tempfile, "TemporaryFile", lambda dir: full)
        assert "No space left on device" in message(monkeypatch, None)


def test_no_such_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no Ray cluster answers there (" in message(monkeypatch, "no-such-host.invalid:6379")


@pytest.mark.parametrize(
    ("serve", "reason"),
    [
        (refuse, "something else listens there"),
        (http, "something else listens there"),
        (wait, "nothing came back within 0.5 s"),
    ],
    ids=["closes", "http", "silent"],
)
def test_something_else_listens(monkeypatch: pytest.MonkeyPatch, serve, reason: str) -> None:
    monkeypatch.setattr(ray_connection, "CONNECT_TIMEOUT_S", 0.5)
    with listening(serve) as address:
        told = message(monkeypatch, address)
    assert f"RAY_ADDRESS={address}: no Ray cluster answers there" in told
    assert reason in told or "connection reset by peer" in told


@pytest.mark.parametrize("address", ["nonsense", "host:", ":6379", "host:port"])
def test_an_address_of_another_form(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    assert f"RAY_ADDRESS={address}: expected HOST:PORT" in message(monkeypatch, address)


def test_ray_that_does_not_start_here_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise Exception(
            "The current node timed out during startup."
        )  # as Ray raises it, without a type of its own

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_connection.ray, "init", init)
    with pytest.raises(
        IIVerlError, match=r"did not start on this machine: The current node .*\n.*runtime=local"
    ):
        start_ray(cpus=1)


def test_workers_of_a_cluster_get_the_variables_of_this_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setenv("RAY_ADDRESS", "first:6379")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    monkeypatch.setattr(ray_connection, "_check_cluster", lambda address: None)
    monkeypatch.setattr(ray_connection.ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(ray_connection.ray, "nodes", lambda: [{"Alive": True}])
    start_ray(cpus=1)
    variables = given["runtime_env"]["env_vars"]
    assert variables["NCCL_SOCKET_IFNAME"] == "eth1"
    assert not {"PATH", "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES", "HOME"} & variables.keys()
    monkeypatch.delenv("RAY_ADDRESS")
    start_ray(cpus=1)
    assert given["runtime_env"] is None  # they are children of this process
