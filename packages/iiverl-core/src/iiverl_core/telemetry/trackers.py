"""Track a run's metrics and a few responses: console, file and services."""

import logging
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from iiverl_core.errors import IIVerlError
from iiverl_core.installation import install_command
from iiverl_core.registry import TRACKERS, load_code
from iiverl_core.telemetry.generations import Generation, as_lines
from iiverl_core.telemetry.history import JsonLines, validation_scores
from iiverl_core.telemetry.metrics import SCORE
from iiverl_core.telemetry.timers import duration, short

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrackerSetup:
    """What a tracker is built from: the folder it writes to, and `log`, which shows a line to the user.

    `config` is the whole configuration in plain values; `total_steps` is None if the number of steps is not known. A run
    that resumes has the `run_id` that it had before, by which a service finds what to continue.
    """

    folder: Path
    project: str
    experiment: str
    config: Mapping[str, Any]
    log: Callable[[str], None] = print
    total_steps: int | None = None
    run_id: str = ""


class Tracker(Protocol):
    """Receives the metrics of each step, which may come in several calls with different metrics."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics of a step."""
        ...

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        """Log responses of the validation at a step."""
        ...

    def close(self) -> None:
        """Flush and close; nothing is logged afterwards."""
        ...


@runtime_checkable
class FileTracker(Tracker, Protocol):
    """A tracker whose service keeps files of a run."""

    def log_files(self, files: Mapping[str, Path]) -> None:
        """Save files of a run that is about to end, by a name of what they are."""
        ...


KEY_FIGURES: dict[str, tuple[str, ...]] = {
    "reward": (SCORE,),
    "kl": ("actor/kl_loss", "critic/kl", "actor/ppo_kl"),
    "length": ("response_length/mean",),
    "grad": ("actor/grad_norm",),
    "entropy": ("actor/entropy", "actor/entropy_loss"),
    "clip": ("actor/pg_clipfrac",),
}
"""Metrics in the console's line by label, most important first; of several metrics, the first that a step has."""

FILE_COLUMNS = 120
"""Width of lines if there is no terminal."""


class Console:
    """Logs a line of key figures per step and a few lines per response; other metrics are in the files."""

    def __init__(self, log: Callable[[str], None], total_steps: int | None = None) -> None:
        self._log = log
        self._of_total = "" if total_steps is None else f"/{total_steps}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the line of a step, and another one for a validation; neither without key figures."""
        columns = shutil.get_terminal_size((FILE_COLUMNS, 24)).columns
        if figures := key_figures(metrics):
            parts = [f"step {step}{self._of_total}", *figures]
            while len(parts) > 2 and len("  ".join(parts)) > columns:
                parts.pop()
            self._log("  ".join(parts))
        if scores := validation_scores(metrics):
            parts = [f"{source} {number(score)}" for source, score in scores.items()]
            text = f"step {step}{self._of_total}  validation  {'  '.join(parts)}"
            self._log(textwrap.fill(text, columns, subsequent_indent="  ", break_long_words=False))

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        """Log the responses, each on a few lines."""
        self._log(
            "\n".join([f"responses at step {step}:", *(line for row in rows for line in as_lines(row))])
        )

    def close(self) -> None:
        """Do nothing."""


def number(value: float) -> str:
    """Format a number so that `float()` can read it: whole numbers exactly, others with at least four digits."""
    if isinstance(value, int):
        return str(value)
    if abs(value) < 1e15 and (value.is_integer() or abs(value) >= 1000):
        return f"{value:.1f}"
    return f"{value:.4g}"


def key_figures(metrics: Mapping[str, float]) -> list[str]:
    """Format the key figures of a step, most important first: `reward 0.412`, …, `12.3 s`, `4.6k tok/s`.

    Tokens per second are those of all devices.
    """
    figures = [
        f"{label} {value:.3g}"
        for label, names in KEY_FIGURES.items()
        if (value := next((metrics[name] for name in names if name in metrics), None)) is not None
    ]
    if not figures:
        return []
    seconds, tokens = metrics.get("timing_s/step"), metrics.get("perf/total_num_tokens")
    if seconds is not None:
        figures.append(f"{seconds:.3g} s" if seconds < 1000 else duration(seconds))
    if seconds and tokens is not None:
        figures.append(f"{short(tokens / seconds)} tok/s")
    return figures


class Trackers:
    """Several trackers as one. If one fails, it is reported once, and the others and the run continue."""

    def __init__(self, trackers: Mapping[str, Tracker]) -> None:
        self._trackers = dict(trackers)
        self._reported: set[tuple[str, str]] = set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics with each tracker."""
        plain = {name: value if type(value) is int else float(value) for name, value in metrics.items()}
        self._each("metrics", f"could not log step {step}", lambda tracker: tracker.log(plain, step))

    def log_generations(self, rows: Sequence[Generation], step: int) -> None:
        """Log the responses with each tracker."""
        action = f"could not log the responses of step {step}"
        self._each("responses", action, lambda tracker: tracker.log_generations(rows, step))

    @property
    def keeps_files(self) -> bool:
        """Whether a tracker's service keeps files."""
        return any(isinstance(tracker, FileTracker) for tracker in self._trackers.values())

    def log_files(self, files: Mapping[str, Path]) -> None:
        """Save the files with each tracker whose service keeps some."""
        there = {name: path for name, path in files.items() if path.is_file()}

        def save(tracker: Tracker) -> None:
            if isinstance(tracker, FileTracker):
                tracker.log_files(there)

        self._each("files", "could not save the run's files", save)

    def close(self) -> None:
        """Close each tracker."""
        self._each("metrics", "could not be closed", lambda tracker: tracker.close())

    def _each(self, kind: str, problem: str, call: Callable[[Tracker], None]) -> None:
        for name, tracker in self._trackers.items():
            try:
                call(tracker)
            except Exception as error:
                self._report(name, kind, problem, error)

    def _report(self, name: str, kind: str, problem: str, error: Exception) -> None:
        if (name, kind) in self._reported:
            return
        self._reported.add((name, kind))
        logger.warning(
            "tracker %s %s (%s: %s). The run and the other trackers continue; this is logged once.",
            name,
            problem,
            type(error).__name__,
            error,
        )


def make_trackers(
    names: Sequence[str],
    folder: Path,
    project: str,
    experiment: str,
    config: Mapping[str, Any],
    *,
    log: Callable[[str], None] = print,
    total_steps: int | None = None,
    run_id: str = "",
) -> Trackers:
    """Build the trackers with these names and combine them; see `TrackerSetup`.

    Raises:
        ConfigError: a name is not in the registry.
        IIVerlError: a tracker's package is not installed, or the tracker cannot start.
    """
    setup = TrackerSetup(folder, project, experiment, config, log, total_steps, run_id)
    trackers: dict[str, Tracker] = {}
    try:
        for name in dict.fromkeys(names):
            trackers[name] = _make(name, setup)
    except IIVerlError:
        Trackers(trackers).close()
        raise
    return Trackers(trackers)


def console_tracker(setup: TrackerSetup) -> Tracker:
    """Build the tracker `console`."""
    return Console(setup.log, setup.total_steps)


def jsonl_tracker(setup: TrackerSetup) -> Tracker:
    """Build the tracker `jsonl`."""
    return JsonLines(setup.folder)


def _make(name: str, setup: TrackerSetup) -> Tracker:
    info = TRACKERS.find(name, "trainer.logger")
    try:
        return load_code(info.code, name)(setup)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise IIVerlError(
                f"{error.filename} cannot be written: {error.strerror}. Set trainer.default_local_dir to another folder."
            ) from error
        problem = f"{name} could not start ({type(error).__name__}: {error}).\nFix the cause"
        if isinstance(error, ModuleNotFoundError) and error.name == info.package:
            problem = f"the package {name} is not installed.\nInstall it ({install_command(name)})"
        raise IIVerlError(
            f"trainer.logger lists {name}: {problem}, or remove {name} from trainer.logger."
        ) from error
