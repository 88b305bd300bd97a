"""Running the server until it is told to stop."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Sequence

import uvicorn

from iiverl_reward_client.server.app import create_app
from iiverl_reward_client.server.scoring import Scoring
from iiverl_reward_client.server.settings import Settings, SettingsError, variable_of

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 75  # longer than clients keep a connection, so that they close it
_STOP_SECONDS = 10  # that requests under way have to finish
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(settings: Settings, files: Sequence[str] = (), tell: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM; requests under way are finished first, and no process is left behind.

    `files` are users' verifiers as `file.py:function`. `tell` gets lines for whoever started the server.

    Raises:
        SettingsError: the address cannot be listened on, or a verifier named in `files` cannot be used.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    scoring = Scoring(settings, files)
    with _listening(settings.bind_host, settings.bind_port) as listener:
        asyncio.run(_serve(scoring, files, listener, tell))


async def _serve(
    scoring: Scoring, files: Sequence[str], listener: socket.socket, tell: Callable[[str], None]
) -> None:
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(scoring),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
    )
    try:
        await scoring.start()
        for written in files:
            if reason := scoring.unavailable.get(written.rpartition(":")[2]):
                raise SettingsError(reason)
        _introduce(scoring, listener, tell)
        if threading.current_thread() is threading.main_thread():
            # uvicorn raises the signal once more when it has stopped, for whoever handled it before: itself, so that
            # to be told to stop is an ordinary end.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, server.handle_exit)
        await server.serve(sockets=[listener])
    finally:
        await scoring.close()


def _introduce(scoring: Scoring, listener: socket.socket, tell: Callable[[str], None]) -> None:
    host, port = listener.getsockname()[:2]
    tell(f"reward server on http://{f'[{host}]' if ':' in host else host}:{port}")
    tell(f"verifies: {', '.join(scoring.types)}")
    for type, reason in scoring.unavailable.items():
        tell(f"does not verify {type}: {reason}")
    if scoring.settings.bind_host not in _LOOPBACK and scoring.settings.token is None:
        tell(f"warning: anyone who reaches {host} can use it; set {variable_of('token')} to ask for a token")


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
    # Connections inherit it. asyncio sets it only on sockets that name TCP as their protocol, which this one does not,
    # and without it an answer's last packet waits for the client's delayed acknowledgement, 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
