"""Report a finished run: the reward curve, the results, and the paths of its files."""

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from iiverl_core.telemetry.curve import draw_png, draw_text
from iiverl_core.telemetry.findings import find_problems
from iiverl_core.telemetry.history import METRICS_FILE, is_finite_number, read_history, validation_scores
from iiverl_core.telemetry.html_report import HTML_REPORT, ReportedRun, write_html_report
from iiverl_core.telemetry.metrics import SCORE
from iiverl_core.telemetry.samples import sample_files
from iiverl_core.telemetry.services import TENSORBOARD_FOLDER
from iiverl_core.telemetry.terminal import takes_escape_codes
from iiverl_core.telemetry.timers import duration

logger = logging.getLogger(__name__)

PICTURE = "reward.png"
TITLE_WIDTH = 72  # a longer experiment name appears only below the curve


def report(
    folder: Path,
    experiment: str,
    *,
    total_steps: int | None = None,
    samples: Path | None = None,
    checkpoint: Path | None = None,
    next_line: str | None = None,
    ended_well: bool = True,
    log: Callable[[str], None] = print,
) -> None:
    """Draw the reward curve in the terminal and to `{folder}/reward.png`, summarize the run, and write its HTML report.

    Everything is read from `metrics.jsonl` in `folder`. `total_steps` is the planned number, to recognize an interrupted
    run; `samples` is the folder of sample dumps, `checkpoint` that of the newest checkpoint; `next_line` suggests the next
    thing to do, by default to write to the trained model or to look at the samples or TensorBoard, and is omitted unless
    `ended_well`. A run with fewer than two rewards has no curve, and a
    picture that cannot be drawn is a warning.
    """
    records = read_history(folder)
    trained = [record for record in records if record["step"] > 0]
    rewards = [(record["step"], record[SCORE]) for record in trained if is_finite_number(record.get(SCORE))]
    if len(rewards) > 1:
        title = f"{experiment}: mean reward"
        _draw(folder / PICTURE, rewards, title if len(title) <= TITLE_WIDTH else "mean reward", log)
    log(_headline(experiment, trained, total_steps))
    scores = [reward for _, reward in rewards]
    for name, text in _facts(folder, experiment, records, scores, samples, checkpoint):
        log(f"  {name:<13}{text}")
    for finding in find_problems(records):
        log(f"look at {finding.metric}: {finding.text}\n  {finding.advice}")
    if ended_well:
        log(f"next: {next_line or _next(folder, samples, checkpoint)}")


def first_and_last(rewards: Sequence[float]) -> tuple[float, float, int]:
    """Return the means of the first and the last tenth of the rewards, and the size of a tenth (at least one)."""
    n = max(1, len(rewards) // 10)
    return sum(rewards[:n]) / n, sum(rewards[-n:]) / n, n


def _draw(
    picture: Path, rewards: Sequence[tuple[int, float]], title: str, log: Callable[[str], None]
) -> None:
    steps, values = zip(*rewards, strict=True)
    text = draw_text(steps, values, title, colour=takes_escape_codes(sys.stdout))
    if _can_print(text):
        log(text)
    try:
        draw_png(picture, steps, values, title)
    except (ImportError, OSError) as error:
        logger.warning("the reward curve was not saved as %s: %s", picture, error)


def _write_page(folder: Path, experiment: str) -> bool:
    try:
        write_html_report(folder / HTML_REPORT, [ReportedRun(experiment, folder)])
    except OSError as error:
        logger.warning("the report was not saved as %s: %s", folder / HTML_REPORT, error)
        return False
    return True


def _headline(experiment: str, trained: Sequence[dict[str, Any]], total_steps: int | None) -> str:
    if not trained:
        return f"{experiment}: no training step was finished"
    last = trained[-1]["step"]
    seconds = sum(record.get("timing_s/step") or 0.0 for record in trained)
    steps = f"{last} step{'s' * (last != 1)}"
    if total_steps is not None and last < total_steps:
        steps = f"stopped after {last} of {total_steps} steps,"
    return f"{experiment}: {steps} in {duration(seconds)}"


def _facts(
    folder: Path,
    experiment: str,
    records: Sequence[dict[str, Any]],
    rewards: Sequence[float],
    samples: Path | None,
    checkpoint: Path | None,
) -> Iterator[tuple[str, str]]:
    """Yield the results of the run, and the path of each file that exists."""
    trained = [record for record in records if record["step"] > 0]
    if rewards:
        yield "reward", _change(rewards)
    elif trained:
        yield "reward", "none: no sample was scored, see reward/failed in the metrics"
    failed = sum(record.get("reward/failed") or 0.0 for record in records)
    if failed:
        yield (
            "failed",
            f"{failed:.0f} samples had no score and were not trained on, see reward/failed in the metrics",
        )
    for name, scores in _validations(records).items():
        first = f"{scores[0]:.3f} -> " if len(scores) > 1 else ""
        when = ", before training" if len(scores) == 1 and trained and "val/failed" in records[0] else ""
        yield "validation", f"{first}{scores[-1]:.3f} ({name}{when})"
    if (folder / METRICS_FILE).exists():
        yield "metrics", _show(folder / METRICS_FILE)
    if len(rewards) > 1 and (folder / PICTURE).exists():
        yield "curve", _show(folder / PICTURE)
    if records and _write_page(folder, experiment):
        yield "report", f"{_show(folder / HTML_REPORT)} (curves and samples, for a browser)"
    if (folder / TENSORBOARD_FOLDER).exists():
        yield "tensorboard", _tensorboard(folder)
    if checkpoint is not None:
        yield "checkpoint", _show(checkpoint)
    elif trained:
        yield "weights", "not saved: set trainer.save_freq to keep them"
    if samples is not None and samples.exists():
        yield "samples", f"{_show(samples)}{os.sep}STEP.parquet"


def _change(rewards: Sequence[float]) -> str:
    if len(rewards) == 1:
        return f"{rewards[0]:.3f}"
    first, last, n = first_and_last(rewards)
    ratio = f", x{last / first:.1f}" if first > 0 and last > 0 else ""
    return f"{first:.3f} -> {last:.3f}{ratio} (first and last {f'{n} steps' if n > 1 else 'step'})"


def _validations(records: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Collect the mean test scores of each data source, ordered by step."""
    scores: dict[str, list[float]] = {}
    for record in records:
        for source, score in validation_scores(record).items():
            scores.setdefault(source, []).append(score)
    return scores


def _next(folder: Path, samples: Path | None, checkpoint: Path | None) -> str:
    if checkpoint is not None and (model := checkpoint / "actor" / "huggingface").is_dir():
        code = (
            f'from transformers import pipeline; write = pipeline("text-generation", {json.dumps(_show(model))}); '
            'print(write([{"role": "user", "content": input("> ")}])[0]["generated_text"][-1]["content"])'
        )
        return f"write to the model:\n  {_tool('python')} -c {shlex.quote(code)}"
    if samples is not None and (dumps := sample_files(samples)):
        last = _show(dumps[max(dumps)])
        columns = '["prompt", "response", "score"]'
        code = f"import pandas; print(pandas.read_parquet({json.dumps(last)})[{columns}].drop_duplicates().head(8))"
        return f"read what the model wrote in the last step:\n  {_tool('python')} -c {shlex.quote(code)}"
    if (folder / TENSORBOARD_FOLDER).exists():
        return f"look at every metric: {_tensorboard(folder)}"
    return "set trainer.rollout_data_dir to save the samples of each step, and read what the model writes"


def _tensorboard(folder: Path) -> str:
    return f"{_tool('tensorboard')} --logdir {shlex.quote(_show(folder / TENSORBOARD_FOLDER))}"


def _tool(name: str) -> str:
    """Return a command by its name if the shell finds it, or by its path in this environment."""
    beside = Path(sys.executable).with_name(name)
    if not beside.exists() or ((known := shutil.which(name)) and Path(known).absolute() == beside):
        return name
    return shlex.quote(_show(beside))


def _show(path: Path) -> str:
    """Write a path relative to the working directory if it is below it."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _can_print(text: str) -> bool:
    """Return whether the terminal's encoding has the characters of the curve."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
