"""The report of a run as one HTML file, which needs no network: curves, findings, and a browser of samples."""

from iiverl_core.telemetry.html_report.page import HTML_REPORT, ReportedRun, write_html_report
from iiverl_core.telemetry.html_report.server import ReportServer

__all__ = ["HTML_REPORT", "ReportServer", "ReportedRun", "write_html_report"]
