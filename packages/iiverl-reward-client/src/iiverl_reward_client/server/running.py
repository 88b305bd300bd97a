"""Run the server until it is stopped."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import uvicorn

from iiverl_reward_client.server.app import create_app
from iiverl_reward_client.server.connections import BoundedConnection, raise_descriptor_limit
from iiverl_reward_client.server.scoring import Scoring
from iiverl_reward_client.server.settings import Settings, SettingsError, variable_of

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection, so that they close it
_STOP_SECONDS = 10  # for requests in flight to finish
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(settings: Settings, files: Sequence[str] = (), log: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM; requests in flight are finished first, and no process is left behind.

    `files` are user verifiers as `file.py:function`. `log` is called with lines for the user.

    Raises:
        SettingsError: the address cannot be listened on, or a verifier named in `files` cannot be used.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    scoring = Scoring(settings, files)
    with _listening(settings.bind_host, settings.bind_port) as listener:
        asyncio.run(_serve(scoring, files, listener, log))


def uvicorn_config(scoring: Scoring, max_connections: int, **connection: float) -> uvicorn.Config:
    """Configure uvicorn for the application; `connection` has further arguments of `BoundedConnection`."""
    bounded: Any = partial(BoundedConnection, max_connections=max_connections, **connection)
    return uvicorn.Config(
        create_app(scoring),
        http=bounded,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )


async def _serve(
    scoring: Scoring, files: Sequence[str], listener: socket.socket, log: Callable[[str], None]
) -> None:
    server = uvicorn.Server(uvicorn_config(scoring, raise_descriptor_limit()))
    try:
        await scoring.start()
        for written in files:
            if reason := scoring.unavailable.get(written.rpartition(":")[2]):
                raise SettingsError(reason)
        _log_start(scoring, listener, log)
        if threading.current_thread() is threading.main_thread():
            # After stopping, uvicorn raises the signal again for the previous handler. That is uvicorn too, so that a
            # signal is an ordinary end.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, server.handle_exit)
        await server.serve(sockets=[listener])
    finally:
        await scoring.close()


def _log_start(scoring: Scoring, listener: socket.socket, log: Callable[[str], None]) -> None:
    host, port = listener.getsockname()[:2]
    log(f"reward server on http://{f'[{host}]' if ':' in host else host}:{port}")
    log(f"verifies: {', '.join(scoring.types)}")
    for type, reason in scoring.unavailable.items():
        log(f"does not verify {type}: {reason}")
    if scoring.settings.bind_host not in _LOOPBACK and scoring.settings.token is None:
        log(f"warning: anyone who reaches {host} can use it; set {variable_of('token')} to ask for a token")


def _listening(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        SettingsError: there is no such address here, or the port is in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error}. Set {variable_of('bind_host')} and "
            f"{variable_of('bind_port')}, or --host and --port."
        ) from None
    # Connections inherit this. asyncio sets it only on sockets whose protocol is given as TCP, unlike this one; without
    # it a response's last packet waits 40 ms for the client's delayed acknowledgement.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
