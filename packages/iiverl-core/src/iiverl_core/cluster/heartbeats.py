"""Reports of what the processes of a run are doing, for its watchdog: each writes its own, and the driver reads them all.

They travel through a `TCPStore` on the driver's machine, since a process that is stuck in a call answers no other one.
"""

import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from iiverl_core import activity
from iiverl_core.cluster.runtime import ProcessReport


@dataclass(frozen=True)
class HeartbeatAddress:
    """Where a process sends its reports, by which key and label, and how often."""

    host: str
    port: int
    key: str
    label: str
    interval_s: float


class Heartbeats:
    """The driver's end: knows whose reports to expect, and reads what each process reported last."""

    def __init__(self, host: str, interval_s: float) -> None:
        """Listen on `host`, a name of this machine that the others can reach."""
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._host, self._interval_s = host, interval_s
        self._lock = threading.Lock()
        self._expected: dict[str, HeartbeatAddress] = {}
        self._number = 0
        self._heard: dict[str, tuple[bytes, float]] = {}  # the last report by key, and when it was first read

    def expect(self, label: str) -> HeartbeatAddress:
        """Expect the reports of one more process, and return where it has to send them."""
        with self._lock:
            key, self._number = str(self._number), self._number + 1
            address = HeartbeatAddress(self._host, self._store.port, key, label, self._interval_s)
            self._expected[key] = address
            return address

    def forget(self, address: HeartbeatAddress) -> None:
        """Do not expect these reports any longer, since the process has ended."""
        with self._lock:
            self._expected.pop(address.key, None)
            self._heard.pop(address.key, None)

    def read(self) -> list[ProcessReport]:
        """Read the last report of every expected process."""
        with self._lock:
            return [self._read(address) for address in self._expected.values()]

    def _read(self, address: HeartbeatAddress) -> ProcessReport:
        key, now = address.key, time.monotonic()
        if not self._store.check([key]):
            return ProcessReport(address.label)
        content = self._store.get(key)
        if key not in self._heard or self._heard[key][0] != content:
            self._heard[key] = content, now
        values: dict[str, Any] = json.loads(content)
        del values["beat"]  # which makes every report another
        return ProcessReport(**{**values, "age_s": now - self._heard[key][1]})


def send_heartbeats(address: HeartbeatAddress) -> None:
    """Report what this process is doing, from a thread of its own, until the process ends or nobody listens."""
    threading.Thread(target=_send, args=(address,), name="iiverl-heartbeats", daemon=True).start()


def _send(address: HeartbeatAddress) -> None:
    from torch.distributed import DistError, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    process = f"process {os.getpid()} on {socket.gethostname()}"
    beat, before = 0, -1
    try:
        store = TCPStore(address.host, address.port, is_master=False, wait_for_workers=False)
        while True:
            now = activity.current()
            # Stacks are large, and of interest only if nothing moves.
            stacks = activity.stacks() if now.count == before else ""
            beat, before = beat + 1, now.count
            call_s = time.monotonic() - now.since if now.call else 0.0
            report = ProcessReport(address.label, process, now.call, call_s, now.count, stacks)
            store.set(address.key, json.dumps({**asdict(report), "beat": beat}))
            time.sleep(address.interval_s)
    except DistError:
        return  # the driver has gone, or its port is closed to this machine, which the watchdog says when asked
