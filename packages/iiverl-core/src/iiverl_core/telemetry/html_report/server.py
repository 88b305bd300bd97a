"""Serve the report of a run while the run goes on."""

from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from iiverl_core.telemetry.history import METRICS_FILE
from iiverl_core.telemetry.html_report.page import ReportedRun, html_report
from iiverl_core.telemetry.run_record import samples_folder


class ReportServer(ThreadingHTTPServer):
    """Serves the report at `/`, made again when a run has written something, and its version at `/version`.

    An open page asks for the version now and then, and loads itself again when it has changed.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], runs: Sequence[ReportedRun]) -> None:
        """Listen at an address; port 0 is any free one.

        Raises:
            OSError: the port is taken, or the address is not one of this machine.
        """
        super().__init__(address, _Handler)
        self._runs, self._lock = tuple(runs), Lock()
        self._page, self._made = "", ""

    def version(self) -> str:
        """Return what changes whenever a run has written metrics or samples."""
        written = [_changed(path) for run in self._runs for path in _inputs(run)]
        return "-".join(map(str, written))

    def page(self) -> str:
        """Return the newest report."""
        with self._lock:
            version = self.version()
            if version != self._made:
                self._page, self._made = html_report(self._runs, version), version
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        match self.path:
            case "/":
                self._answer(self.server.page(), "text/html")
            case "/version":
                self._answer(self.server.version(), "text/plain")
            case _:
                self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def _answer(self, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)


def _inputs(run: ReportedRun) -> tuple[Path, Path]:
    return run.folder / METRICS_FILE, samples_folder(run.folder)


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
