"""The self-test: a program that tries what a sandbox must not let it reach."""

import json
import os
import socket
import tempfile
from pathlib import Path

from iiverl_reward_client.verifiers.sandbox.base import Limits, Sandbox, SandboxError

PROBE_LIMITS = Limits(cpu_seconds=5, wall_seconds=20, memory_bytes=256 << 20, processes=4, file_bytes=1 << 20)

# Prints what it can reach and should not be able to.
_PROBE = """
import ctypes, json, os, socket, sys
given = json.load(sys.stdin)
reached = []

def attempt(name, act):
    try:
        if act() is not False:
            reached.append(name)
    except OSError:
        pass

def connect():
    with socket.socket() as s:
        s.settimeout(2)
        s.connect(("127.0.0.1", given["port"]))

attempt("the loopback network", connect)
attempt("the server's files", lambda: open(given["file"]).read())
attempt("the server's process", lambda: os.kill(given["pid"], 0) if given["pid"] > 9 else False)
attempt("writing outside the scratch folder", lambda: open("/usr/probe", "w"))
attempt("new namespaces", lambda: ctypes.CDLL(None).unshare(0x10000000) == 0)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
attempt("root's uid", lambda: "0" in status["Uid"].split())
attempt("capabilities", lambda: any(int(status["Cap" + kind], 16) for kind in ("Prm", "Eff", "Bnd", "Amb")))
attempt("new privileges", lambda: status["NoNewPrivs"].strip() != "1" or status["Seccomp"].strip() != "2")
open("scratch", "w").write("x")
print(json.dumps(reached))
"""


def leaks(sandbox: Sandbox) -> list[str]:
    """Run a program that tries what it must not reach, and return what it reached.

    Raises:
        SandboxError: the program did not finish.
    """
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # so that the sandbox hides the file, not its mode
        secret = Path(folder, "secret")
        secret.write_text("secret")
        given = {"port": server.getsockname()[1], "file": str(secret), "pid": os.getpid()}
        execution = sandbox.run(_PROBE, json.dumps(given), limits=PROBE_LIMITS)
    if execution.ended != "exit" or execution.exit_code != 0:
        raise SandboxError(f"its self-test failed: {execution}")
    return json.loads(execution.stdout)
