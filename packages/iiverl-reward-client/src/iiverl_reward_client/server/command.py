"""The command line of the reward server: `iiverl-reward-server`, and `iiverl reward-server` in the distribution `iiverl`."""

import importlib.util
import signal
import sys
import threading
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

_NEEDED = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "math_verify")


def main(
    arguments: Sequence[str] | None = None,
    *,
    program: str = "iiverl-reward-server",
    install: str = "pip install 'iiverl-reward-client[server]'",
) -> int:
    """Run the reward server until it is interrupted; return the exit code.

    0 after SIGINT or SIGTERM while serving, 130 or 143 if one arrives before, 2 for bad input. Messages go to stderr.

    Args:
        arguments: Command-line arguments, by default the process's.
        program: Name to show in the help.
        install: Command to show if a dependency is missing.
    """
    options = _parser(program).parse_args(arguments)
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        _print(f"error: the reward server needs {', '.join(missing)}. Install it: {install}")
        return 2
    try:
        with _sigterm_exits():
            return _serve(options)
    except KeyboardInterrupt:
        _print("interrupted")
        return 128 + signal.SIGINT


def _serve(options: Namespace) -> int:
    from iiverl_reward_client.server import SettingsError, load_settings, serve

    given = {"bind_host": options.host, "bind_port": options.port, "workers": options.workers}
    try:
        settings = load_settings(options.env_file).model_copy(
            update={name: value for name, value in given.items() if value is not None}
        )
        serve(settings, options.verifier, log=_print)
    except SettingsError as error:
        _print(f"error: {error}")
        return 2
    return 0


def _parser(program: str) -> ArgumentParser:
    parser = ArgumentParser(
        program,
        description="Score responses over HTTP. Other settings are environment variables or lines of a .env file.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", metavar="ADDRESS", help="Address to listen on. Default: 127.0.0.1.")
    parser.add_argument(
        "--port",
        type=_whole(0, 65535),
        metavar="PORT",
        help="Port to listen on; 0 for any free one. Default: 8000.",
    )
    parser.add_argument("--env-file", metavar="FILE", help="File with settings. Default: .env, if it exists.")
    parser.add_argument(
        "--verifier",
        action="append",
        default=[],
        metavar="FILE.py:FUNCTION",
        help="A verifier of your own; its name is the type that it verifies. May be given several times.",
    )
    parser.add_argument(
        "--workers",
        type=_whole(1),
        metavar="N",
        help="Processes per type. Default: the number of cores, at most 4.",
    )
    return parser


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least or (most is not None and int(text) > most):
            wanted = f"at least {least}" if most is None else f"from {least} to {most}"
            raise ArgumentTypeError(f"must be a whole number {wanted}, not {text!r}")
        return int(text)

    return parse


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Exit cleanly on SIGTERM while the server starts, so that no worker process is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
