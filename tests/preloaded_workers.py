"""Ray workers that begin with what they would import, which takes most of a worker's start.

    python preloaded_workers.py serve SOCKET MODULE…    imports modules once, and forks at each request
    python -S preloaded_workers.py start SOCKET …       asks for a fork that runs a program, and ends when it has

Ray starts a worker by a command, for which a runtime environment may name another interpreter: here the second one. Its
working folder, environment, arguments and standard streams are those of the process that is forked.

Ray is not among the modules: its library reads the environment when it is loaded. The connection stays open for as long as
the forked process lives.
"""

import json
import os
import socket
import sys
from pathlib import Path

BYTES = 2**16  # to receive at a time


def serve(address: str, modules: list[str]) -> None:
    """Fork for each connection, until standard input ends."""
    import gc
    import importlib
    import runpy
    import select
    import signal

    with socket.socket(socket.AF_UNIX) as server:
        for module in modules:
            importlib.import_module(module)
        assert "ray" not in sys.modules
        gc.collect()
        gc.freeze()  # a collection would copy the pages of all objects
        server.bind(address)
        server.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that are forked
        while True:
            if sys.stdin in select.select([server, sys.stdin], [], [])[0]:
                return
            connection, _ = server.accept()
            message, streams, _, _ = socket.recv_fds(connection, BYTES, 3)
            if os.fork() == 0:
                break
            connection.close()
            for each in streams:
                os.close(each)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)
    while more := connection.recv(BYTES):
        message += more
    for number, each in enumerate(streams):
        os.dup2(each, number)
        os.close(each)
    request = json.loads(message)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = request["arguments"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def start(address: str, arguments: list[str]) -> None:
    """Ask for a fork and wait for its end."""
    request = {"folder": str(Path.cwd()), "environment": dict(os.environ), "arguments": arguments}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        message = json.dumps(request).encode()
        sent = socket.send_fds(connection, [message], [0, 1, 2])
        connection.sendall(message[sent:])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)


if __name__ == "__main__":
    mode, where, *others = sys.argv[1:]
    {"serve": serve, "start": start}[mode](where, others)
