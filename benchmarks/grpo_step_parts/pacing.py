"""A program's side of the comparison: wait for permission before each step, and report what the step took.

Imports nothing but the standard library and torch, since TRL runs in an environment of its own.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping

import torch

MARK = "STEP "


class Pacer:
    """Paces the steps of this process, whose output goes to stderr except for the reports."""

    def __init__(self) -> None:
        self._reports = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self._start = self._cpu = 0.0

    def begin(self) -> None:
        """Wait for a line on stdin, and start the clocks."""
        if not sys.stdin.readline():
            raise SystemExit(0)
        self._cpu, self._start = _cpu_seconds(), time.perf_counter()

    def end(self, parts: Mapping[str, float]) -> None:
        """Report a step, and the seconds of its parts."""
        report = {
            "seconds": time.perf_counter() - self._start,
            "cpu_seconds": _cpu_seconds() - self._cpu,
            "parts": dict(parts),
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "peak_device_mb": torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else 0,
        }
        self._reports.write(MARK + json.dumps(report) + "\n")


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
