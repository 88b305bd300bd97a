"""The command `iiverl runs`: what has become of the runs below a folder."""

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from iiverl_cli.output import clean_exit, format_table

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTH = 100
MIN_NAME = 12
HEADINGS = ("run", "state", "step", "reward", "age", "latest", "best")


@dataclass(frozen=True)
class RunSummary:
    """What is known of a run. `age` is the seconds since it last wrote anything; `checkpoint` and `best` are steps."""

    folder: str
    state: str
    step: int | None
    total_steps: int | None
    reward: float | None
    age: float
    exit_code: int | None
    checkpoint: int | None
    best: int | None
    best_metric: str | None
    best_value: float | None

    def row(self, width: int) -> tuple[str, ...]:
        """Give the cells of the table."""
        from iiverl_core.telemetry import duration

        name = self.folder if len(self.folder) <= width else "…" + self.folder[1 - width :]
        step = "-" if self.step is None else str(self.step)
        best = "-" if self.best is None else str(self.best)
        return (
            name,
            f"failed ({self.exit_code})" if self.state == "failed" else self.state,
            step if self.total_steps is None else f"{step}/{self.total_steps}",
            "-" if self.reward is None else f"{self.reward:.3f}",
            duration(self.age),
            "-" if self.checkpoint is None else str(self.checkpoint),
            best if self.best_value is None else f"{best} ({self.best_value:.3f})",
        )


def runs(
    folder: Annotated[
        str, typer.Argument(metavar="DIR", help="The folder below which the runs are.")
    ] = "checkpoints",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the runs below a folder: state, last step and reward, age, latest and best checkpoint."""
    with clean_exit():
        root = Path(folder).expanduser()
        if not root.is_dir():
            raise typer.BadParameter(f"{folder} is not a folder", param_hint="DIR")
        found = [_summary(root, path) for path in sorted(set(_run_folders(root)))]
        if as_json:
            typer.echo(json.dumps([asdict(each) for each in found], indent=2))
        elif not found:
            typer.echo(f"there are no runs below {folder}")
        else:
            found.sort(key=lambda each: each.age)
            others = format_table([HEADINGS[1:], *(each.row(WIDTH)[1:] for each in found)])
            room = WIDTH - 2 - max(map(len, others.splitlines()))
            rows = [HEADINGS, *(each.row(max(room, MIN_NAME)) for each in found)]
            typer.echo(format_table(rows, align="<<>>>><", rule=True))


def _run_folders(root: Path) -> "Iterator[Path]":
    """Find the folders that a run wrote to, without looking into checkpoints."""
    from iiverl_core.checkpoints import POINTER
    from iiverl_core.telemetry import METRICS_FILE, RUN_FILE

    for path, folders, files in os.walk(root):
        if not {RUN_FILE, METRICS_FILE, POINTER}.isdisjoint(files):
            yield Path(path)
        folders[:] = [name for name in folders if not name.lstrip(".").startswith("global_step_")]


def _summary(root: Path, folder: Path) -> RunSummary:
    from iiverl_core.checkpoints import POINTER, best, checkpoints, latest
    from iiverl_core.telemetry import METRICS_FILE, RUN_FILE, SCORE, read_history, read_run

    record = read_run(folder)
    history = [line for line in read_history(folder) if line["step"] > 0]
    rewards = [line[SCORE] for line in history if isinstance(line.get(SCORE), int | float)]
    newest = latest(folder, hashes=False).checkpoint
    metric = record.best_metric if record else None
    champion = best(checkpoints(folder), metric) if metric else None
    written = [
        path.stat().st_mtime for name in (RUN_FILE, METRICS_FILE, POINTER) if (path := folder / name).exists()
    ]
    return RunSummary(
        folder=str(folder.relative_to(root)),
        state=record.state() if record else "unknown",
        step=history[-1]["step"] if history else None,
        total_steps=record.total_steps if record else None,
        reward=rewards[-1] if rewards else None,
        age=max(0.0, time.time() - max(written)),
        exit_code=record.exit_code if record else None,
        checkpoint=newest.step if newest else None,
        best=champion.step if champion else None,
        best_metric=metric,
        best_value=champion.metrics[metric] if champion and metric else None,
    )
