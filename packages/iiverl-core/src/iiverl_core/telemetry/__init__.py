"""Metrics, timings, trackers, live progress, sample dumps and the final report of a run."""

from iiverl_core.telemetry.flops import mfu, peak_flops, training_flops
from iiverl_core.telemetry.generations import Generation, pick
from iiverl_core.telemetry.history import METRICS_FILE, read_history
from iiverl_core.telemetry.metrics import (
    SCORE,
    Stats,
    batch_metrics,
    perf_metrics,
    seqlen_metrics,
    shared_fractions,
    token_timings,
)
from iiverl_core.telemetry.progress import Progress
from iiverl_core.telemetry.report import report
from iiverl_core.telemetry.run_lock import RunLock
from iiverl_core.telemetry.run_record import RUN_FILE, RunRecord, RunRecorder, read_run, samples_folder
from iiverl_core.telemetry.samples import SampleNumbers, sample_files, write_samples, write_scored
from iiverl_core.telemetry.timers import Phase, Timers, duration
from iiverl_core.telemetry.trackers import Tracker, make_trackers
from iiverl_core.telemetry.validation import validation_metrics

__all__ = [
    "METRICS_FILE",
    "RUN_FILE",
    "SCORE",
    "Generation",
    "Phase",
    "Progress",
    "RunLock",
    "RunRecord",
    "RunRecorder",
    "SampleNumbers",
    "Stats",
    "Timers",
    "Tracker",
    "batch_metrics",
    "duration",
    "make_trackers",
    "mfu",
    "peak_flops",
    "perf_metrics",
    "pick",
    "read_history",
    "read_run",
    "report",
    "sample_files",
    "samples_folder",
    "seqlen_metrics",
    "shared_fractions",
    "token_timings",
    "training_flops",
    "validation_metrics",
    "write_samples",
    "write_scored",
]
