"""The report as one HTML file: the page's files and the data of runs."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from iiverl_core.sequence_files import TOKENIZER_FILE
from iiverl_core.telemetry.findings import find_problems
from iiverl_core.telemetry.history import read_history
from iiverl_core.telemetry.html_report.charts import curves, meanings, shown_charts
from iiverl_core.telemetry.html_report.chosen_samples import BYTES_PER_STEP, MAX_BYTES, choose_samples
from iiverl_core.telemetry.html_report.token_numbers import TOKEN_BYTES_PER_STEP, add_token_numbers
from iiverl_core.telemetry.run_record import read_run, samples_folder

HTML_REPORT = "report.html"


@dataclass(frozen=True)
class ReportedRun:
    """A run in a report: its name there, and the folder that it wrote to."""

    name: str
    folder: Path


def write_html_report(path: Path, runs: Sequence[ReportedRun]) -> int:
    """Write the report of a run, with the curves of others over its own, and return its size in bytes.

    Samples and findings are those of the first run. The file is written atomically.

    Raises:
        OSError: the file cannot be written.
    """
    text = html_report(runs)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        unfinished.write_text(text, "utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return len(text.encode())


def html_report(runs: Sequence[ReportedRun], version: str | None = None) -> str:
    """Return the page that `write_html_report` writes; with `version`, it asks its server whether there is a newer one."""
    histories = {run: read_history(run.folder) for run in runs}
    drawn = {run: curves(history) for run, history in histories.items()}
    names = sorted({name for each in drawn.values() for name in each["values"]})
    first, here = runs[0], runs[0].folder.absolute()
    dumps = samples_folder(here)
    for_tokens = TOKEN_BYTES_PER_STEP if (dumps / TOKENIZER_FILE).exists() else 0
    samples = choose_samples(dumps, bytes_per_step=BYTES_PER_STEP - for_tokens)
    add_token_numbers(dumps, samples.samples, min(samples.steps * for_tokens, MAX_BYTES))
    data: dict[str, Any] = {
        "version": version,
        "runs": [_facts(run) | {"curves": each} for run, each in drawn.items()],
        "charts": shown_charts(names),
        "meanings": meanings(names),
        "findings": [
            {"text": finding.text, "advice": finding.advice, "metric": finding.metric}
            for finding in find_problems(histories[first])
        ],
        "samples": samples.samples,
        "images": samples.images,
        "samples_total": samples.total,
        "samples_estimated": samples.estimated,
        "samples_folder": str(dumps.relative_to(here) if dumps.is_relative_to(here) else dumps),
    }
    return _filled(_asset("page.html"), f"{first.name} · iiverl", data)


def _facts(run: ReportedRun) -> dict[str, Any]:
    record = read_run(run.folder)
    if record is None:
        return {"name": run.name}
    return {
        "name": run.name,
        "state": record.state(),
        "started": record.started,
        "ended": record.ended or record.heartbeat,
        "total_steps": record.total_steps,
    }


def _filled(page: str, title: str, data: dict[str, Any]) -> str:
    # "<" within a JSON string only: written so, no text of a sample can end the script.
    encoded = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    parts = {
        "title": html.escape(title),
        "style": _asset("page.css"),
        "data": encoded,
        "script": _asset("tokens.js") + _asset("page.js") + (_asset("live.js") if data["version"] else ""),
    }
    before, *rest = page.split("{{")
    return before + "".join(
        parts[name.strip()] + after for name, after in (part.split("}}", 1) for part in rest)
    )


def _asset(name: str) -> str:
    return files("iiverl_core.telemetry.html_report").joinpath(name).read_text("utf-8")
